"""Packages that only parts of ttt4rec need; without one, an error of one line says what to install."""

import importlib

_EXTRAS = {
    "numpy": "recsys",
    "safetensors": "recsys",
    "tqdm": "recsys",
    "pyarrow": "parquet",
    "matplotlib": "plot",
    "recbole": "recbole",
    "rectools": "rectools",
    "psycopg": "postgres",
    "httptools": "serve",
    "prometheus_client": "serve",
    "pydantic": "serve",
    "uvicorn": "serve",
    "tensorboard": "track",
    "wandb": "track",
    "mlflow": "track",
    "transformers": "hf",
    "huggingface_hub": "hf",
}
"""The extra of ttt4rec that brings a package."""


class MissingPackageError(ModuleNotFoundError):
    """A package is not installed that an extra of ttt4rec brings."""


def require(what: str, *packages: str) -> None:
    """Import packages, to say what is missing before anything is done.

    Args:
        what: what needs them.
        packages: their names.

    Raises:
        MissingPackageError: one is not installed.
    """
    for package in packages:
        try:
            importlib.import_module(package)
        except ModuleNotFoundError as error:
            raise missing(what, error) from error


def missing(what: str, error: ModuleNotFoundError) -> ModuleNotFoundError:
    """The error to raise instead, if the package that is not there belongs to an extra; else the same one."""
    package = (error.name or "").partition(".")[0]
    if package not in _EXTRAS:
        return error
    return MissingPackageError(
        f'{what} needs the package {package}, which is not installed: pip install "ttt4rec[{_EXTRAS[package]}]"',
        name=error.name,
        path=error.path,
    )
