"""What pyproject.toml cannot say: the recipes in configs/ are installed as a part of the package."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["hf_clars*"]), "hf_clars.configs"],
    package_dir={"hf_clars.configs": "configs"},
    package_data={
        "hf_clars": ["py.typed", "**/README.md", "plots/page/*", "grad_norms/rules/h100.json"],
        "hf_clars.configs": ["**/*"],
    },
)
