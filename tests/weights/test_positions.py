"""Position tables at another size equal torch's bicubic interpolation."""

import numpy as np
import pytest
import torch

from jvlm.errors import UserError
from jvlm.weights.positions import resize_positions


@pytest.mark.parametrize(("old", "new"), [(27, 70), (37, 16), (27, 48), (4, 9), (5, 5)])
@pytest.mark.parametrize("offset", [None, 0.1])
@pytest.mark.parametrize("class_token", [False, True])
def test_interpolation_equals_torch(old, new, offset, class_token):
    table = np.random.default_rng(old * new).normal(size=(old * old + class_token, 3)).astype(np.float32)
    places = torch.from_numpy(table[int(class_token) :]).double().reshape(1, old, old, 3).permute(0, 3, 1, 2)
    to = {"size": (new, new)} if offset is None else {"scale_factor": (new + offset) / old}
    expected = torch.nn.functional.interpolate(places, mode="bicubic", align_corners=False, **to)
    expected = expected[0].permute(1, 2, 0).reshape(-1, 3).numpy()
    scale = None if offset is None else (new + offset) / old
    found = resize_positions(table, new, class_token=class_token, scale=scale)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found[: int(class_token)], table[: int(class_token)])
    np.testing.assert_allclose(found[int(class_token) :], expected, atol=2e-6)


def test_a_table_that_is_not_square_is_refused():
    with pytest.raises(UserError, match="50 vectors is not square"):
        resize_positions(np.zeros((50, 3), np.float32), 7)
