"""ImageNet as records: a folder of classes as tensorflow-datasets prepares it, no TensorFlow."""

import pathlib
from collections.abc import Iterator
from typing import Any

from bitmixer_jax.data._encoded import FolderSource, open_folder
from bitmixer_jax.errors import UserError

NAME, VERSION = "imagenet2012", "5.1.0"
_SPLITS = ("train", "validation")


def write_records(source: pathlib.Path, data_dir: pathlib.Path) -> pathlib.Path:
    """Writes `data_dir/imagenet2012/5.1.0` as ArrayRecord; one that is there is left as it is.

    The files are copied as they are, shuffled, some hundred megabytes to a file of records. The
    folder has its name only when it is whole. Needs twice the space of the images meanwhile.

    Args:
      source: folder with `train/CLASS/*.JPEG` and `val/CLASS/*.JPEG`.

    Raises:
      UserError: the source is wrong or incomplete, or `data_dir` cannot be written to.
    """
    target = data_dir / NAME / VERSION
    if (target / "dataset_info.json").is_file():
        return target
    opened = {split: open_folder(source, split, skip_unreadable=False) for split in _SPLITS}
    classes = opened["train"][1]
    try:
        import tensorflow_datasets as tfds

        data_dir.mkdir(parents=True, exist_ok=True)
        builder = _builder({split: found for split, (found, _) in opened.items()}, classes)(
            data_dir=data_dir, file_format="array_record"
        )
        # Nothing is to be fetched: without this it would ask a server first.
        config = tfds.download.DownloadConfig(try_download_gcs=False)
        builder.download_and_prepare(download_config=config)
    except ImportError as error:
        raise UserError(f"preparing imagenet needs tensorflow-datasets ({error})") from error
    except OSError as error:
        raise UserError(f"cannot prepare imagenet in {data_dir}: {error}") from error
    return target


def _builder(sources: dict[str, FolderSource], classes: tuple[str, ...]) -> Any:
    """The builder class of these images, with the features of the stock imagenet2012."""
    import tensorflow_datasets as tfds

    class Imagenet2012(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
        """ImageNet from a folder of classes."""

        # With a dotted module, tensorflow-datasets 4.9.10 looks for the builder's code through
        # importlib_resources, which nothing installs.
        __module__ = NAME
        VERSION = tfds.core.Version(VERSION)

        def _info(self) -> Any:
            features = tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(encoding_format="jpeg"),
                    "label": tfds.features.ClassLabel(names=classes),
                    "file_name": tfds.features.Text(),
                }
            )
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, _: Any) -> dict[str, Any]:
            return {split: self._generate_examples(split) for split in sources}

        def _generate_examples(self, split: str) -> Iterator[tuple[str, Any]]:
            source = sources[split]
            for index in range(len(source)):
                data, label = source.read(index)
                path = pathlib.Path(source.name(index))
                name = path.name
                yield (
                    f"{path.parent.name}/{name}",
                    {
                        "image": data,
                        "label": label,
                        "file_name": name,
                    },
                )

    return Imagenet2012
