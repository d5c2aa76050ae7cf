"""Run an exported ONNX file on images without torch: NumPy, Pillow and onnxruntime (safetensors for text).

    python -m clipdense.run.export.runner model.onnx photo.jpg --text words.safetensors --output labels.png

This file, `arrays.py`, `file_metadata.py` and `text_input.py` import nothing else: copied into one folder,
they run where clipdense is not installed (``python runner.py ...``).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

try:
    from clipdense.run.export import arrays, file_metadata, text_input
except ImportError:  # copied into a folder of its own
    sys.path.insert(0, str(Path(__file__).parent))
    import arrays  # type: ignore[import-not-found, no-redef]
    import file_metadata  # type: ignore[import-not-found, no-redef]
    import text_input  # type: ignore[import-not-found, no-redef]

__all__ = ["OnnxModel", "main"]

Floats = npt.NDArray[np.float32]


class OnnxModel:
    """An exported ONNX file with the classes that it predicts.

    Attributes:
        metadata: what the file says about itself.
        text: class names and their embeddings; None before `set_text` and for a file with constant classes.
    """

    def __init__(self, path: str | Path, text: str | Path | None = None, threads: int = 0) -> None:
        """
        Args:
            path: the ONNX file.
            text: text table, see `set_text`.
            threads: of one operator; 0: onnxruntime's choice.

        Raises:
            FileNotFoundError: If a file does not exist.
            FileMetadataError: If the file was not written by clipdense, or sets more than it may.
            ValueError: If the text table does not fit.
        """
        import onnxruntime

        if not Path(path).is_file():
            raise FileNotFoundError(f"no exported file '{path}'")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        properties = self.session.get_modelmeta().custom_metadata_map
        if file_metadata.METADATA_KEY not in properties:
            raise file_metadata.FileMetadataError(
                f"{path} has no metadata of clipdense: export it with clipdense export"
            )
        self.metadata = file_metadata.FileMetadata.from_json(
            properties[file_metadata.METADATA_KEY], str(path)
        )
        self.inputs = {entry.name for entry in self.session.get_inputs()}
        self.outputs = [entry.name for entry in self.session.get_outputs()]
        self.text: text_input.TextInput | None = None
        if text is not None:
            self.set_text(text)

    def set_text(self, table: str | Path) -> None:
        """Set the classes to predict.

        Args:
            table: a .safetensors file of ``tools/make_text_table.py`` or ``clipdense export --text-output``.

        Raises:
            FileNotFoundError: If it does not exist.
            ValueError: If the file has constant classes, or the table does not fit it.
        """
        self.text = text_input.read_text_input(table, self.metadata)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes that are predicted."""
        return self.metadata.classes if self.text is None else self.text.classes

    def __call__(self, image: str | Path | Image.Image) -> dict[str, Any]:
        """Predict on one image; the output has the image's own size.

        Returns:
            Task "semantic" and "masks": ``sem_seg`` (K, H, W) scores and ``labels`` (H, W), -1 for no class;
            "masks" also ``panoptic_seg`` (ids (H, W), segments). Task "boxes": ``boxes`` (N, 4) xyxy,
            ``scores`` (N,), ``classes`` (N,) and, if the model has them, ``masks`` (N, h, w) probabilities in
            their boxes.

        Raises:
            ValueError: If the classes are not set, or the image is too small.
        """
        source = image if isinstance(image, Image.Image) else Image.open(image)
        source = ImageOps.exif_transpose(source).convert("RGB")
        pixels = self.preprocess(source)
        size = source.height, source.width
        merge = {"semantic": self._semantic, "masks": self._masks, "boxes": self._boxes}
        return merge[self.metadata.task](pixels, size)

    def preprocess(self, image: Image.Image) -> Floats:
        """Resize and normalise an RGB image as (1, 3, H, W), without padding."""
        m = self.metadata
        size = arrays.test_size(image.height, image.width, m.shortest, m.longest)
        if m.fixed_size and not m.window:
            size = m.fixed_size[0], m.fixed_size[1]
        if min(size) < m.min_size:
            raise ValueError(f"the image has {size[0]} x {size[1]} pixels, at least {m.min_size} are needed")
        if size != (image.height, image.width):
            image = image.resize((size[1], size[0]), Image.Resampling.BILINEAR)
        pixels = np.asarray(image, np.float32)
        pixels = pixels if m.channels == "RGB" else pixels[..., ::-1]
        mean, std = np.array(m.pixel_mean, np.float32), np.array(m.pixel_std, np.float32)
        normalised = (pixels - mean) / std
        return np.ascontiguousarray(normalised.transpose(2, 0, 1)[None], np.float32)

    def run(self, images: Floats, size: tuple[int, int] | None = None) -> dict[str, Any]:
        """Run the file on padded images.

        Args:
            images: (B, 3, H, W), normalised and padded.
            size: height and width without padding, for files that read it; default: H and W.

        Returns:
            The outputs of the file by name.
        """
        feeds: dict[str, Any] = {
            "images": images,
            "image_size": np.array(size or images.shape[-2:], np.int64),
        }
        if self.metadata.text != "none":
            if self.text is None:
                raise ValueError("the file needs class names: give a text table (--text, set_text)")
            feeds |= self.text.arrays
            feeds["base"] = self.text.base
        feeds = {name: value for name, value in feeds.items() if name in self.inputs}
        return dict(zip(self.outputs, self.session.run(self.outputs, feeds), strict=True))

    def _maps(self, pixels: Floats) -> Floats:
        """Compute the logits of a window or of the whole image: (1, S, h, w) at its size, if so exported."""
        m = self.metadata
        padded, place = arrays.pad_to_multiple(pixels, m.multiple, m.centred_padding)
        logits: Floats = self.run(padded)["logits"]
        if not m.resize_to_input:
            return logits
        logits = arrays.resize_maps(logits, padded.shape[-2:])
        return logits[(..., *place)] if m.crop_padding else logits

    def _semantic(self, pixels: Floats, size: tuple[int, int]) -> dict[str, Any]:
        m = self.metadata
        if m.window:
            logits = arrays.windowed(self._maps, pixels, m.window, m.window_stride)
        else:
            logits = self._maps(pixels)
        if m.activation == "sigmoid":
            scores = arrays.resize_maps(1 / (1 + np.exp(-logits[0])), size)
        else:
            scores = m.logit_scale * arrays.resize_maps(logits[0], size)
        if m.activation == "softmax":
            scores = arrays.softmax(scores, 0)
        if m.text == "names" and self.text is not None:
            names = self.text.arrays["synonyms"]  # (K, M)
            scores = np.stack([scores[row].max(0) for row in names])
        return {"sem_seg": scores, "labels": self._labels(scores)}

    def _labels(self, scores: Floats) -> Any:
        """Return the best class of each pixel; the background or -1 where its score is low."""
        labels = scores.argmax(0)
        if self.metadata.score_threshold:
            names = [name.casefold() for name in self.classes]
            background = names.index("background") if "background" in names else -1
            labels[scores.max(0) < self.metadata.score_threshold] = background
        return labels

    def _masks(self, pixels: Floats, size: tuple[int, int]) -> dict[str, Any]:
        m = self.metadata
        padded, place = arrays.pad_to_multiple(pixels, m.multiple)
        found = self.run(padded, (pixels.shape[-2], pixels.shape[-1]))
        scores = found["scores"][0]
        logits = arrays.resize_maps(found["mask_logits"][0], padded.shape[-2:])[(..., *place)]
        resized = arrays.resize_maps(logits, size)
        masks = _sigmoid(resized if m.resize_masks_first else logits)
        maps = (scores[:, :-1].T @ masks.reshape(len(masks), -1)).reshape(-1, *masks.shape[1:])
        maps = arrays.resize_maps(maps, size)
        if m.calibration and self.text is not None:
            maps = maps - m.calibration * self.text.base[:, None, None]
        probabilities = scores / np.maximum(scores.sum(1, keepdims=True), np.finfo(np.float32).tiny)
        panoptic = arrays.merge_panoptic(
            probabilities,
            _sigmoid(resized),
            self._things(),
            object_threshold=m.object_threshold,
            overlap_threshold=m.overlap_threshold,
            pixel_threshold=m.pixel_threshold,
        )
        return {"sem_seg": maps, "labels": maps.argmax(0), "panoptic_seg": panoptic}

    def _things(self) -> tuple[int, ...]:
        """Return the countable classes; all of them, if the table does not tell."""
        if self.text is None:
            return self.metadata.things
        return tuple(range(len(self.text.classes))) if self.text.things is None else self.text.things

    def _boxes(self, pixels: Floats, size: tuple[int, int]) -> dict[str, Any]:
        m = self.metadata
        padded, _ = arrays.pad_to_multiple(pixels, m.multiple)
        height, width = pixels.shape[-2:]
        found = self.run(padded, (height, width))
        if m.postprocessed:
            kept = found["scores"] > max(m.score_threshold, 0)
            result = {name: value[kept] for name, value in found.items()}
        else:
            rows, columns = arrays.non_maximum_suppression(
                found["boxes"],
                found["scores"][:, :-1],
                threshold=m.score_threshold,
                overlap=m.nms_threshold,
                limit=m.max_detections,
            )
            boxes = found["boxes"]
            result = {
                "boxes": boxes[rows] if boxes.ndim == 2 else boxes[rows, columns],
                "scores": found["scores"][rows, columns],
                "classes": columns,
            }
        scale = np.array([size[1] / width, size[0] / height] * 2, np.float32)
        boxes = result["boxes"] * scale
        result["boxes"] = np.clip(boxes, 0, np.array([size[1], size[0]] * 2, np.float32))
        return result


def _sigmoid(logits: Floats) -> Floats:
    return np.asarray(1 / (1 + np.exp(-logits)), np.float32)


def save_labels(path: str | Path, labels: npt.NDArray[Any]) -> None:
    """Write a label map (H, W) as a PNG with a colour per class; "no class" is black, index 0."""
    generator = np.random.default_rng(0)
    palette = generator.integers(40, 255, (65536, 3), dtype=np.uint8)
    palette[0] = 0
    colours = palette[(labels.astype(np.int64) + 1) % 65536]
    Image.fromarray(colours).save(path, format="PNG")


def describe(output: Mapping[str, Any], classes: tuple[str, ...]) -> list[str]:
    """Describe an output in lines: share of each class, or the detections."""
    if "boxes" in output:
        rows = zip(
            output["boxes"].tolist(), output["scores"].tolist(), output["classes"].tolist(), strict=True
        )
        return [f"{classes[k]:24}{s:6.2f}  {[round(v) for v in box]}" for box, s, k in rows]
    labels, counts = np.unique(output["labels"], return_counts=True)
    shares = sorted(zip(counts / output["labels"].size, labels.tolist(), strict=True), reverse=True)
    return [f"{classes[k] if k >= 0 else '(no class)':24}{share:7.1%}" for share, k in shares]


def main(argv: list[str] | None = None) -> int:
    """Segment or detect on images, and print what was found."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="ONNX file of clipdense export")
    parser.add_argument("images", nargs="+", help="image files")
    parser.add_argument("--text", metavar="FILE", help="text table (.safetensors)")
    parser.add_argument("--output", metavar="FILE", help="write the label map of the last image as a PNG")
    args = parser.parse_args(argv)
    try:
        model = OnnxModel(args.model, args.text)
        for image in args.images:
            output = model(image)
            print(image)
            print("\n".join(f"  {line}" for line in describe(output, model.classes)))
        if args.output and "labels" in output:
            save_labels(args.output, output["labels"])
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
