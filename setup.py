"""The package list: scale_llm, and what travels in the wheel as packages of its own: conf/ (Hydra's YAML files) as
scale_llm_conf, slurm/ (the scripts of jobs) as scale_llm_slurm."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["scale_llm", "scale_llm.*"]), "scale_llm_conf", "scale_llm_slurm"],
    package_dir={"scale_llm_conf": "conf", "scale_llm_slurm": "slurm"},
    package_data={
        "scale_llm_conf": ["**/*.yaml"],
        "scale_llm_slurm": ["*.sh", "*.sbatch", "*.md"],
        "scale_llm": ["**/*.cpp", "**/*.h", "**/*.jinja", "**/py.typed"],
    },
)
