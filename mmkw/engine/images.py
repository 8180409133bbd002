"""Files of images, as the model of a config takes them."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from mmengine.config import Config
from mmengine.dataset import Compose, pseudo_collate

IMAGE_TYPES = ('.bmp', '.jpeg', '.jpg', '.png', '.tif', '.tiff', '.webp')


def images_in(folder: Path) -> list[Path]:
    """The images of a folder, not of those in it, in the order of their names.

    Args:
        folder: An existing folder.
    """
    return sorted(p for p in folder.iterdir() if p.is_file() and p.suffix.lower() in IMAGE_TYPES)


def test_pipeline(config: Config) -> Compose:
    """Builds the test pipeline of a config without what loads annotations.

    Args:
        config: With a ``test_dataloader``.

    Raises:
        ValueError: If the config has none, or its pipeline reads no files.
    """
    if not isinstance(config.get('test_dataloader'), dict):
        raise ValueError('The config has no test_dataloader, whose pipeline reads images: add one.')
    dataset = config.test_dataloader.dataset
    while 'pipeline' not in dataset:
        dataset = dataset.dataset if 'dataset' in dataset else dataset.datasets[0]
    if not any('FromFile' in str(step['type']) for step in dataset.pipeline):
        raise ValueError(
            'The test pipeline of the config reads no files: put dict(type="LoadImageFromFile") '
            'first.'
        )
    return Compose([step for step in dataset.pipeline if 'Annotations' not in str(step['type'])])


class ImageLoader:
    """Batches of one image, as the data loaders of MMEngine give them, for ``model.test_step``.

    Args:
        config: With a ``test_dataloader``, whose pipeline reads the images.
        paths: Images, and folders of images.

    Raises:
        FileNotFoundError: If a path does not exist, or a folder has no image.
        ValueError: While it is gone through, if a file is no image.
    """

    def __init__(self, config: Config, paths: Sequence[str | Path]) -> None:
        self._pipeline = test_pipeline(config)
        self._paths: list[Path] = []
        for path in map(Path, paths):
            found = images_in(path) if path.is_dir() else [path] if path.is_file() else []
            if not found:
                raise FileNotFoundError(f'{path} is no image and no folder of images')
            self._paths += found

    def __len__(self) -> int:
        return len(self._paths)

    def __iter__(self) -> Iterator[dict]:
        for number, path in enumerate(self._paths):
            try:
                sample = self._pipeline(dict(img_path=str(path), img_id=number))
            except AssertionError as error:
                # mmcv's transform asserts that the file was read.
                raise ValueError(f'{path} cannot be read as an image') from error
            yield pseudo_collate([sample])
