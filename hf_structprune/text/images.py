"""Calibration rows of text and images: read, and made by a model's processor into what the model is given.

Pictures are taken as they are in memory or in a dataset, or read from files that a local file or the caller names. An
address is never fetched, and no path that comes with a dataset of the Hub is opened.
"""

from __future__ import annotations

import io
import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import CalibrationError, TextError
from .calibration import CalibrationConfig, rendered
from .reading import is_local, read_objects


_NO_TEMPLATE = (
    "the processor has no chat template: set `processor.chat_template`, or give texts with the model's own "
    "placeholders of pictures and `chat_template=False`."
)


def load_image_rows(config: CalibrationConfig, processor: Any) -> list[dict[str, Any]]:
    """What a model that sees is given for `config.num_samples` rows: token ids, pixels and what else it needs.

    One row is drawn in each of as many equal stretches of a source; with several datasets, row `i` is of dataset
    `i % len(datasets)`. Rows stay whole.

    Returns:
        The output of the processor for each row, a batch of one, as PyTorch tensors.

    Raises:
        CalibrationError: There are too few rows, none has a picture, a picture cannot be read, or the processor
            refuses a row.
    """
    try:
        sources = _sources(config)
        found: list[dict[str, Any]] = [{}] * config.num_samples
        pictures = 0
        for place, (name, folder, rows) in enumerate(sources):
            numbers = range(place, config.num_samples, len(sources))
            for number, index in zip(numbers, _drawn(name, len(rows), len(numbers), config.seed), strict=True):
                where, row = f"Row {index} of {name}", rows[index]
                text, images = _text_and_images(where, row, config, processor, folder)
                found[number] = _processed(where, processor, text, images)
                pictures += len(images)
    except CalibrationError:
        raise
    except TextError as error:
        raise CalibrationError(str(error)) from error
    if not pictures:
        raise CalibrationError(
            f"No calibration row has a picture under {config.image_column!r}, which `image_column` names (a row has "
            f"{', '.join(map(repr, row))}), nor among its messages."
        )
    return found


def _sources(config: CalibrationConfig) -> list[tuple[str, Path | None, Sequence[Any]]]:
    """Names for messages, folders that paths of pictures are relative to (`None`: paths are refused), and rows."""
    if config.texts is not None:
        return [("`texts`", Path(), config.texts)]
    datasets = [config.dataset] if isinstance(config.dataset, str) else config.dataset
    if not datasets:
        raise CalibrationError(
            "`image_column` is given, and no rows with pictures are: the packaged sample is text alone. Give them as "
            "`dataset` or `texts`."
        )
    if config.num_samples < len(datasets):
        raise CalibrationError(
            f"`num_samples` is {config.num_samples}, but there are {len(datasets)} datasets to take a row of."
        )
    found = []
    for source in datasets:
        path = Path(source).expanduser()
        folder = (path if path.is_dir() else path.parent) if is_local(source) else None
        found.append((source, folder, read_objects(source, name=config.name, split=config.split)))
    return found


def _drawn(name: str, there: int, count: int, seed: int) -> list[int]:
    """One number out of each of `count` equal stretches."""
    if there < count:
        raise CalibrationError(
            f"There are {there} rows in {name}, and {count} are wanted: give more, or lower `num_samples`."
        )
    rng = random.Random(seed)
    return [rng.randrange(i * there // count, (i + 1) * there // count) for i in range(count)]


def _text_and_images(
    where: str, row: Any, config: CalibrationConfig, processor: Any, folder: Path | None
) -> tuple[str, list[Any]]:
    """The text of a row, with the placeholders of its pictures, and those in their order."""
    if not isinstance(row, dict) or config.column not in row:
        what = f"has {', '.join(map(repr, row))}" if isinstance(row, dict) else f"is a {type(row).__name__}"
        raise CalibrationError(f"{where} has no {config.column!r}, which `column` names; it {what}.")
    content, given = row[config.column], row.get(config.image_column)
    given = [] if given is None or config.image_column == config.column else given
    given = given if isinstance(given, (list, tuple)) else [given]
    if config.chat_template:
        chat, given = _chat(where, content, given)
        content = rendered(where, chat, processor, _NO_TEMPLATE)
    elif not isinstance(content, str):
        raise CalibrationError(
            f"{where} has a {type(content).__name__} as its text. Set `chat_template=True` to render chat messages."
        )
    return content, [_opened(where, image, folder) for image in given]


def _chat(where: str, content: Any, given: list[Any]) -> tuple[list[dict[str, Any]], list[Any]]:
    """Chat messages whose contents are lists of parts, and the pictures in their order.

    Pictures that no message has a place for stand in front of what the user says first.
    """
    messages = [{"role": "user", "content": content}] if isinstance(content, str) else content
    if not isinstance(messages, list) or not all(
        isinstance(m, dict) and {"role", "content"} <= {*m} for m in messages
    ):
        raise CalibrationError(f"{where} is neither a text nor a list of {{role, content}} messages.")
    chat, images, left = [], [], list(given)
    for message in messages:
        parts = message["content"]
        parts = [{"type": "text", "text": parts}] if isinstance(parts, str) else parts or []
        chat.append({**message, "content": [dict(part) for part in parts]})
    places = [part for message in chat for part in message["content"] if part.get("type") == "image"]
    if not places and left:
        first = next((message for message in chat if message["role"] == "user"), None)
        if first is None:
            raise CalibrationError(f"{where} has a picture, and no message of a user that it could stand in.")
        places = [{"type": "image"} for _ in left]
        first["content"] = [*places, *first["content"]]
    for part in places:
        inline = [part[key] for key in ("image", "path", "url", "base64") if part.get(key) is not None]
        if not inline and not left:
            raise CalibrationError(f"{where} has {len(places)} places for pictures and {len(given)} pictures.")
        images.append(inline[0] if inline else left.pop(0))
        part.clear()
        part["type"] = "image"
    if left:
        raise CalibrationError(f"{where} has {len(places)} places for pictures and {len(given)} pictures.")
    return chat, images


def _opened(where: str, image: Any, folder: Path | None) -> Any:
    """A picture in RGB; what has no file name, path or bytes is left to the processor."""
    from PIL import Image, ImageOps

    def upright(opened: Image.Image) -> Image.Image:  # as the loaders of Transformers and `datasets` turn it
        return ImageOps.exif_transpose(opened).convert("RGB")

    try:
        if isinstance(image, dict):  # as `datasets` gives what it has not decoded
            if image.get("bytes") is not None:
                return upright(Image.open(io.BytesIO(image["bytes"])))
            image = image.get("path")
        if isinstance(image, (str, os.PathLike)):
            if "://" in str(image) or str(image).startswith("data:"):
                raise CalibrationError(
                    f"{where} names a picture by its address, {str(image)[:80]!r}; nothing is fetched. Give the "
                    "picture, or the path of a file."
                )
            if folder is None:
                raise CalibrationError(
                    f"{where} names a picture by its path, {str(image)[:80]!r}; paths of datasets of the Hub are not "
                    "opened. Give a dataset that holds its pictures."
                )
            with Image.open(folder / Path(image).expanduser()) as opened:
                return upright(opened)
        return image.convert("RGB") if isinstance(image, Image.Image) else image
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        if isinstance(error, CalibrationError):
            raise
        raise CalibrationError(f"{where} has a picture that cannot be read: {error}") from error


def _processed(where: str, processor: Any, text: str, images: list[Any]) -> dict[str, Any]:
    """What the processor makes of a row."""
    try:
        made = processor(text=[text], images=images or None, return_tensors="pt")
    except Exception as error:  # processors are of the models' authors and fail as they like
        token, reason = getattr(processor, "boi_token", None) or getattr(processor, "image_token", None), f"{error}"
        raise CalibrationError(
            f"{where}, with {len(images)} pictures, is refused by the processor: {reason.rstrip('.')}. A text holds a "
            f"placeholder for each picture{f', here {token!r}' if isinstance(token, str) else ''}; "
            "`chat_template=True` puts it there."
        ) from error
    return dict(made)
