"""Sampling parameters refuse what has no meaning, naming the field."""

from __future__ import annotations

import subprocess
import sys

import pytest

from jvlm.errors import UserError
from jvlm.inference.requests import SamplingParams


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_k", 1.5),
        ("top_p", 0),
        ("min_p", 1.1),
        ("repetition_penalty", 0),
        ("presence_penalty", float("inf")),
        ("seed", 2**32),
        ("max_tokens", 0),
        ("min_tokens", -1),
        ("n", 0),
        ("n", True),
        ("logprobs", 21),
        ("prompt_logprobs", -1),
        ("stop", "text"),
        ("stop", ("",)),
        ("stop_token_ids", "12"),
        ("allowed_token_ids", ()),
        ("allowed_token_ids", range(2000)),
        ("logit_bias", {1: float("nan")}),
        ("logit_bias", {"a": 1.0}),
        ("min_tokens", 1000),
    ],
)
def test_a_bad_value_is_refused_by_name(field, value):
    with pytest.raises(UserError, match=f"sampling.{field}"):
        SamplingParams(**{field: value})


def test_values_become_of_one_type():
    params = SamplingParams(top_k=4.0, stop=["a", "b"], stop_token_ids=[1, 2], logit_bias={3: 1})
    assert (params.top_k, params.stop, params.stop_token_ids) == (4, ("a", "b"), (1, 2))
    assert params.logit_bias == {3: 1.0}
    assert not params.sampled


def test_requests_import_no_jax():
    code = "import sys, jvlm.inference.requests; sys.exit('jax' in sys.modules or 'flax' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
