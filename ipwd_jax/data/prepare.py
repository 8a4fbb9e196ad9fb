"""Prepare a TFDS data set for `--config.data.name=tfds:NAME`.

    pip install 'ipwd_jax[tfds]'
    python -m ipwd_jax.data.prepare NAME [DIR]

The data set is written to DIR. The default is $TFDS_DATA_DIR or else the default folder of TFDS.
"""

import argparse
import os
import pathlib

from ipwd_jax import signals
from ipwd_jax.errors import UserError, unknown_name


def prepare(name: str, root: str | None = None) -> pathlib.Path:
    """Download and write a TFDS data set in the `array_record` format.

    Args:
        name: name of the data set in TFDS.
        root: folder to write to; None means `$TFDS_DATA_DIR` or else the default folder of TFDS.

    Returns:
        The folder of the data set.

    Raises:
        UserError: TensorFlow is not installed, there is no such data set, or TFDS cannot download
            or write it.
    """
    import tensorflow_datasets as tfds

    try:
        import tensorflow  # noqa: F401
    except ImportError:
        raise UserError(
            "preparing a data set needs TensorFlow: pip install 'ipwd_jax[tfds]'"
        ) from None
    root = root or os.environ.get("TFDS_DATA_DIR")
    try:
        builder = tfds.builder(name, data_dir=root, file_format="array_record")
        builder.download_and_prepare()
    except tfds.core.registered.DatasetNotFoundError:
        raise unknown_name(
            "TFDS data set", name, tfds.list_builders(with_community_datasets=False)
        ) from None
    except Exception as error:  # TFDS raises many types, also for files to be downloaded by hand
        raise UserError(f"the TFDS data set {name!r} cannot be prepared: {error}") from error
    return pathlib.Path(builder.data_path)


if __name__ == "__main__":
    with signals.exit_statuses(resumes=False):
        parser = argparse.ArgumentParser(
            prog="python -m ipwd_jax.data.prepare",
            description=__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        parser.add_argument("name", metavar="NAME", help="name of the data set in TFDS")
        parser.add_argument("root", metavar="DIR", nargs="?", help="folder to write to")
        given = parser.parse_args()
        print(prepare(given.name, given.root))
