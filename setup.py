"""The package list: scale_llm, and conf/ (Hydra's YAML files), which travels in the wheel as scale_llm_conf."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["scale_llm", "scale_llm.*"]), "scale_llm_conf"],
    package_dir={"scale_llm_conf": "conf"},
    package_data={"scale_llm_conf": ["**/*.yaml"], "scale_llm": ["**/*.cpp", "**/*.jinja", "**/py.typed"]},
)
