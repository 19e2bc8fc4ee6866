"""What pyproject.toml cannot say: the wheel packs configs/ inside of jvlm, where `jvlm.configs` finds them."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(".", include=["jvlm", "jvlm.*"]), *find_packages("kernels"), "jvlm._configs"],
    package_dir={"jvlm_kernels": "kernels/jvlm_kernels", "jvlm._configs": "configs"},
    package_data={
        "jvlm.data.view": ["*.jinja"],
        "jvlm.evaluation": ["*.jinja"],
        "jvlm.sweep": ["*.jinja"],
        "jvlm.rl": ["*.jinja"],
        "jvlm.server.page": ["*.html", "*.css", "*.js"],
        # experiments, the demo's data and its tokenizer, licences
        "jvlm._configs": ["**/*.py", "**/*.arrayrecord", "**/*.json", "**/*.jinja", "**/*.md", "**/*LICENSE"],
    },
)
