"""Packaging of mmkw, with its compiled CPU kernels where they can be built."""

import os
import runpy
import sys
from pathlib import Path

from setuptools import find_packages, setup

SAFETENSORS = 'safetensors>=0.4,<1'
ROOT = Path(__file__).parent
requirement = runpy.run_path(str(ROOT / 'mmkw' / 'requirements.py'))['requirement']


def native_extension() -> dict:
    """Arguments of ``setup`` for the CPU kernels; none where there is no torch to build against.

    The kernels are optional: a failed build is reported and the package installed without them.
    """
    if sys.platform == 'win32':
        return {}
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError:
        print('mmkw: no torch here, its CPU kernels are not built (--no-build-isolation).')
        return {}

    class OptionalBuild(BuildExtension):
        def build_extensions(self) -> None:
            try:
                super().build_extensions()
            except Exception as error:
                print(f'mmkw: its CPU kernels could not be built, PyTorch serves instead: {error}')

        def copy_extensions_to_source(self) -> None:
            if all(map(os.path.exists, self.get_outputs())):
                super().copy_extensions_to_source()

    openmp = [] if sys.platform == 'darwin' else ['-fopenmp']
    extension = CppExtension(
        'mmkw.ops._native',
        [f'mmkw/ops/csrc/{name}.cpp' for name in ('blocks', 'mixing', 'attention', 'operators')],
        depends=[f'mmkw/ops/csrc/{name}.h' for name in ('blocks', 'operators', 'tiles')],
        extra_compile_args=['-O3', '-Wno-psabi', *openmp],
    )
    return dict(
        ext_modules=[extension],
        cmdclass=dict(build_ext=OptionalBuild.with_options(use_ninja=False)),
    )


setup(
    name='mmkw',
    version=runpy.run_path(str(ROOT / 'mmkw' / 'version.py'))['__version__'],
    description='KernelWarehouse dynamic convolution for MMDetection and MMSegmentation',
    long_description=(ROOT / 'README.md').read_text(),
    long_description_content_type='text/markdown',
    # PyTorch calls this when it is imported: checkpoints are read as data from then on.
    entry_points={'torch.backends': ['mmkw = mmkw.autoload:install']},
    packages=find_packages(include=['mmkw', 'mmkw.*']),
    package_data={'mmkw.ops': ['csrc/*']},
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
        'safetensors': [SAFETENSORS],
        # Tests, checks and the demo's data set, made from images inside these packages.
        'dev': [
            'pytest>=8,<10',
            'pytest-xdist>=3.5,<4',
            'hypothesis>=6,<7',
            'ruff>=0.17,<0.18',
            'scikit-image>=0.22,<1',
            'scikit-learn>=1.3,<2',
            SAFETENSORS,
        ],
    },
    **native_extension(),
)
