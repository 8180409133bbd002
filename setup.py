"""Packaging of mmkw, with its compiled CPU kernels where they can be built."""

import os
import runpy
import sys
from pathlib import Path

from setuptools import find_packages, setup

SAFETENSORS = 'safetensors>=0.4,<1'
ONNX = ['onnx>=1.18,<2', 'onnxscript>=0.5,<1', 'onnxruntime>=1.20,<2']
ROOT = Path(__file__).parent
requirement = runpy.run_path(str(ROOT / 'mmkw' / 'requirements.py'))['requirement']


def libraries() -> dict[str, list[str]]:
    """The extras that join mmkw to OpenMMLab's libraries, or to OneDL's releases of them."""
    extras = {}
    for task, name, onedl in (
        ('det', 'mmdet', 'mmdetection'),
        ('seg', 'mmsegmentation', 'mmsegmentation'),
        ('cls', 'mmpretrain', 'mmpretrain'),
    ):
        # mmsegmentation imports ftfy and regex without asking for them.
        more = ['ftfy>=6,<7', 'regex>=2023'] if task == 'seg' else []
        needed = [requirement(library) for library in ('mmengine', 'mmcv', name)]
        # OpenMMLab's MMEngine imports pkg_resources, which setuptools 82 dropped.
        extras[task] = [*needed, *more, 'setuptools<82']
        needed = [requirement(f'onedl-{library}') for library in ('mmengine', 'mmcv', onedl)]
        extras[f'onedl-{task}'] = [*needed, *more]
    return extras


def native_extension() -> dict:
    """Arguments of ``setup`` for the CPU kernels; none where there is no torch to build against.

    The kernels are optional: a failed build is reported and the package installed without them.
    They need the torch that they are used with. So they are built with ``--no-build-isolation``,
    which sees that torch, and not in a build of its own, where pip would install another one.
    """
    if sys.platform == 'win32':
        return {}
    try:
        import torch
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
        [
            f'mmkw/ops/csrc/{name}.cpp'
            for name in (
                'amx',
                'attention',
                'blocks',
                'convolution',
                'image',
                'mixing',
                'operators',
                'products',
                'sbgemm',
            )
        ],
        depends=[
            f'mmkw/ops/csrc/{name}.h' for name in ('amx', 'blocks', 'operators', 'sbgemm', 'tiles')
        ],
        # Whoever loads the kernels compares the torch that they were built for with their own.
        define_macros=[('MMKW_TORCH', f'"{torch.__version__}"')],
        extra_compile_args=['-O3', '-Wno-psabi', *openmp],
    )
    return dict(
        ext_modules=[extension],
        cmdclass=dict(build_ext=OptionalBuild.with_options(use_ninja=False)),
    )


setup(
    name='mmkw',
    version=runpy.run_path(str(ROOT / 'mmkw' / 'version.py'))['__version__'],
    description='KernelWarehouse dynamic convolution for PyTorch and OpenMMLab',
    long_description=(ROOT / 'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    author='The mmkw authors',
    license='Apache-2.0',
    license_files=['LICENSE'],
    keywords='dynamic convolution, KernelWarehouse, object detection, segmentation, OpenMMLab',
    classifiers=[
        'Development Status :: 4 - Beta',
        'Intended Audience :: Developers',
        'Intended Audience :: Science/Research',
        'Operating System :: OS Independent',
        'Programming Language :: C++',
        'Programming Language :: Python :: 3',
        'Programming Language :: Python :: 3 :: Only',
        'Programming Language :: Python :: 3.10',
        'Programming Language :: Python :: 3.11',
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
        'Typing :: Typed',
    ],
    entry_points={
        'console_scripts': ['mmkw = mmkw.cli:main'],
        # PyTorch calls this when it is imported. From then on checkpoints are read as data, and
        # MMEngine finds the configs and models of mmkw.
        'torch.backends': ['mmkw = mmkw.autoload:install'],
    },
    packages=find_packages(include=['mmkw', 'mmkw.*']),
    # .mim holds links to configs, tools and model-index.yml, where OpenMMLab's tools look for them.
    package_data={
        'mmkw': ['py.typed', '.mim/*.yml', '.mim/configs/**/*', '.mim/tools/**/*'],
        'mmkw.ops': ['csrc/*'],
    },
    # Of the tools those that need a clone, or the network.
    exclude_package_data={
        '': ['*.pyc'],
        'mmkw': [f'.mim/tools/{name}' for name in ('demo.py', 'setup_env.sh', 'check_install.sh')],
    },
    python_requires='>=3.10',
    install_requires=[requirement('torch')],
    extras_require={
        **libraries(),
        'safetensors': [SAFETENSORS],
        'deploy': ONNX,
        'docs': ['sphinx>=8,<10', 'myst-parser>=4,<6', 'furo>=2024.8'],
        # Tests, checks and the demo's data set, made from images inside these packages.
        'dev': [
            'pytest>=8,<10',
            'pytest-xdist>=3.5,<4',
            'hypothesis>=6,<7',
            'ruff>=0.17,<0.18',
            'mypy>=2.4,<3',
            'pre-commit>=4,<5',
            'types-PyYAML',
            # Runs the GPU kernels on the CPU, in its interpreter. The torch that PyPI has for Linux
            # names a release of its own: 2.13 names 3.7.1.
            'triton>=3.7,<4; sys_platform == "linux" and platform_machine == "x86_64"',
            'scikit-image>=0.22,<1',
            'scikit-learn>=1.3,<2',
            SAFETENSORS,
            *ONNX,
        ],
    },
    **native_extension(),
)
