"""Packaging of mmkw."""

import runpy
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
requirement = runpy.run_path(str(ROOT / 'mmkw' / 'requirements.py'))['requirement']

setup(
    name='mmkw',
    version=runpy.run_path(str(ROOT / 'mmkw' / 'version.py'))['__version__'],
    description='KernelWarehouse dynamic convolution for MMDetection and MMSegmentation',
    long_description=(ROOT / 'README.md').read_text(),
    long_description_content_type='text/markdown',
    packages=find_packages(include=['mmkw', 'mmkw.*']),
    python_requires='>=3.10',
    install_requires=[
        requirement('torch'),
        requirement('mmengine'),
        requirement('mmcv'),
        # MMEngine imports pkg_resources, which setuptools 81 dropped.
        'setuptools<81',
    ],
    extras_require={
        'det': [requirement('mmdet')],
        # mmsegmentation imports ftfy and regex without asking for them.
        'seg': [requirement('mmsegmentation'), 'ftfy>=6,<7', 'regex>=2023'],
        # Tests, checks and the demo's data set, made from images inside these packages.
        'dev': [
            'pytest>=8,<10',
            'hypothesis>=6,<7',
            'ruff>=0.17,<0.18',
            'scikit-image>=0.22,<1',
            'scikit-learn>=1.3,<2',
        ],
    },
)
