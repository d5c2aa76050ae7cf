"""Packaging: the library with the nano CLIPs' weights, and below it configs, tools and the projects' configs.

In a wheel, `clipdense.tools.train_net` is tools/train_net.py: ``python -m clipdense.tools.train_net``.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
FOLDERS = {
    "clipdense.configs": "configs",
    "clipdense.projects": "projects",
    "clipdense.tools": "tools",
    "clipdense.tools.benchmarks": "tools/benchmarks",
}
EXTRAS = {
    "docs": "docs.txt",
    "efficientnet": "extras.txt",
    "export": "export.txt",
    "mining": "mining.txt",
    "sam": "sam.txt",
    "scale": "scale.txt",
    "supervision": "supervision.txt",
    "test": "test.txt",
    "track": "track.txt",
    "web": "web.txt",
}


def requirements(name: str) -> list[str]:
    lines = (ROOT / "requirements" / name).read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


setup(
    name="clipdense",
    version=re.search(r'__version__ = "(.+)"', (ROOT / "clipdense" / "__init__.py").read_text())[1],
    description="CLIP per pixel and per region, for Detectron2",
    long_description=(ROOT / "README.md").read_text() if (ROOT / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=[*find_packages(include=["clipdense", "clipdense.*"]), *FOLDERS],
    package_dir=FOLDERS,
    package_data={
        "clipdense": [
            "py.typed",
            *(f"**/*.{kind}" for kind in ("css", "html", "js", "json", "safetensors", "txt")),
        ],
        "clipdense.configs": ["**/*.yaml", "**/*.py"],
        "clipdense.projects": ["*.yaml", "*/configs/**/*.yaml", "*/configs/**/*.py", "*/tables/*.yaml"],
    },
    entry_points={"console_scripts": ["clipdense = clipdense.run.cli:main"]},
    install_requires=requirements("base.txt"),
    extras_require={name: requirements(file) for name, file in EXTRAS.items()},
)
