"""Weight files: damaged, of other content, with metadata that sets what it may not, and with code."""

import io
import itertools
import json
import os
import pickle
import random
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from tests.helpers.denseclip_files import mask_rcnn
from tests.reliability.mutations import damage_bytes, flip_bits
from tests.reliability.outcomes import Case, WrongResultError
from tests.reliability.world import CONFIG, World

Write = Callable[[Path], object]


class _Code:
    """Object whose pickle runs a command when it is opened."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.witness}",)


def cases(world: World, seed: int) -> Iterator[Case]:
    """Yield hand-made files, then damaged ones."""
    from clipdense.clip import load_clip

    rng, folder = random.Random(seed), world.folder / "weights"
    folder.mkdir(exist_ok=True)
    witness = folder / "witness"
    clip = load_clip("shapes-vit")
    published = {key.removeprefix("text."): value for key, value in clip.state_dict().items()}

    def case(path: Path, use: Callable[[Path], str]) -> Case:
        names = (path.name, "MODEL.CLIP", "MODEL.WEIGHTS")
        return Case(path.name, lambda: use(path), names, witness=witness)

    makers = itertools.chain(_tensors(clip), _metadata(clip), _archives(), _pickles(published, witness))
    for name, write in makers:
        path = folder / name
        if not path.is_dir():
            write(path)
        yield case(path, _use_model if path.suffix in (".pth", ".pkl") else _use_clip)
    clip.save(folder / "clip.safetensors")
    whole = {
        "clip.safetensors": (folder / "clip.safetensors").read_bytes(),
        "clip.pt": _saved({"state_dict": published}),
        "legacy.pt": _saved(published, _use_new_zipfile_serialization=False),
        "denseclip.pth": _saved(mask_rcnn()),
    }
    for i in itertools.count():
        name = rng.choice(list(whole))
        data, edge = whole[name], min(len(whole[name]), 4000)
        where = rng.random()
        if where < 0.25:  # where the structure is
            kind, data = "start", flip_bits(data[:edge], rng, rng.randint(1, 8)) + data[edge:]
        elif where < 0.5:
            kind, data = "end", data[:-edge] + flip_bits(data[-edge:], rng, rng.randint(1, 8))
        else:
            kind, data = damage_bytes(data, rng)
        path = folder / f"random_{kind.replace(' ', '')}_{name}"  # one file per kind: they are large
        path.write_bytes(data)
        use = _convert if name == "denseclip.pth" else rng.choice([_use_clip, _use_clip, _use_model])
        yield Case(
            f"{i:04d}_{path.name}", lambda use=use, path=path: use(path), (path.name,), witness=witness
        )


def _saved(content: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


def _check_finite(state: dict[str, Any]) -> None:
    if not all(value.isfinite().all() for value in state.values() if value.is_floating_point()):
        raise WrongResultError("weights are NaN or infinite")


def _use_clip(path: Path) -> str:
    from clipdense.clip import load_clip

    clip = load_clip("shapes-vit", str(path)) if path.suffix == ".pt" else load_clip(str(path))
    _check_finite(clip.state_dict())
    return "loaded"


def _use_model(path: Path) -> str:
    from clipdense.engine.build import build_model
    from clipdense.engine.checkpoint import TrainingCheckpointer
    from clipdense.run.setup import load_config

    model = build_model(load_config(CONFIG, ["MODEL.WEIGHTS", str(path)]))
    TrainingCheckpointer(model).load_weights(str(path), complete=True)
    _check_finite(model.state_dict())
    return "loaded"


def _convert(path: Path) -> str:
    from clipdense.checkpoint import read_checkpoint
    from clipdense.run.conversion import convert_weights

    output = path.with_suffix(".converted.safetensors")
    heads = {"MODEL.CLIP.CONFIG.text_cfg.heads": 2, "MODEL.LANGUAGE.CONTEXT_DECODER.HEADS": 2}
    conversion = convert_weights(path, output, options=heads)
    _check_finite(read_checkpoint(output).state)
    return conversion.layout


def _safetensors(state: dict[str, Any], metadata: Any) -> Write:
    from safetensors.torch import save_file

    text = metadata if isinstance(metadata, str) else json.dumps(metadata)
    return lambda path: save_file(
        {key: value.contiguous().clone() for key, value in state.items()}, path, {"clipdense": text}
    )


def _tensors(clip: Any) -> Iterator[tuple[str, Write]]:
    """Yield CLIP files in which one tensor has another type, shape or values."""
    state, metadata = clip.state_dict(), clip.file_metadata()
    key = next(k for k, v in state.items() if v.is_floating_point() and v.dim() == 2)
    value = state[key]
    changed = {
        "nan": value * float("nan"),
        "infinite": value / 0,
        "double": value.double(),
        "half": value.half(),
        "integer": value.long(),
        "boolean": value > 0,
        "float8": value.to(torch.float8_e4m3fn),
        "shape": value[:-1],
        "empty": value[:0],
        "transposed": value.T,
    }
    yield "whole.safetensors", _safetensors(state, metadata)
    for name, tensor in changed.items():
        yield f"one_{name}.safetensors", _safetensors({**state, key: tensor}, metadata)
    rest = {k: v for k, v in state.items() if k != key}
    yield "missing.safetensors", _safetensors(rest, metadata)
    yield "extra.safetensors", _safetensors({**state, "other": torch.ones(1)}, metadata)
    yield "sparse.pt", lambda path: torch.save({**state, key: value.to_sparse()}, path)
    for name, content in (("list", [1, 2]), ("tensor", torch.ones(3)), ("none", {}), ("number", {"a": 1})):
        yield f"{name}.pt", lambda path, content=content: torch.save(content, path)


def _metadata(clip: Any) -> Iterator[tuple[str, Write]]:
    state, good = clip.state_dict(), clip.file_metadata()
    model = good["options"]["config"]["model_cfg"]

    def with_model(**changes: Any) -> dict[str, Any]:
        config = {**good["options"]["config"], "model_cfg": {**model, **changes}}
        return {**good, "options": {**good["options"], "config": config}}

    contents: dict[str, Any] = {
        "not_json": "{",
        "list": [1],
        "null": None,
        "options_list": {"layout": "open_clip", "options": [1]},
        "no_name": {"layout": "open_clip", "options": {"config": {}}},
        "huge": with_model(embed_dim=10**7),
        "hub": with_model(vision_cfg={"timm_model_name": "hf-hub:other/other", "image_size": 64}),
        "hub_text": with_model(text_cfg={**model["text_cfg"], "hf_tokenizer_name": "other/other"}),
        "pickle": {"layout": "clipdense", "options": {"config": {"MODEL.ALLOW_PICKLE": True}}},
        "path": {"layout": "clipdense", "options": {"config": {"OUTPUT_DIR": "/tmp/other"}}},
        "unknown_key": {"layout": "clipdense", "options": {"config": {"NO.SUCH": 1}}},
        "classes": {"layout": "clipdense", "options": {"classes": 5}},
    }
    for name, content in contents.items():
        yield f"metadata_{name}.safetensors", _safetensors(state, content)
        yield f"metadata_{name}.model.safetensors", _safetensors(state, content)


def _archives() -> Iterator[tuple[str, Write]]:
    def archive(entries: dict[str, bytes]) -> Write:
        def write(path: Path) -> None:
            with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
                for name, data in entries.items():
                    file.writestr(name, data)

        return write

    def header(text: bytes) -> Write:
        return lambda path: path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))

    constants = {"archive/constants.pkl": b"\x80\x02)."}
    names = [
        "visual",
        "transformer",
        "token_embedding",
        "positional_embedding",
        "ln_final",
        "text_projection",
    ]
    yield "empty_archive.pt", archive({})
    yield "other_archive.pt", archive({"a.txt": b"x"})
    yield (
        "script.pt",
        archive({**constants, "archive/data.pkl": pickle.dumps(names, 2), "archive/version": b"3\n"}),
    )
    yield "script_pickle.pt", archive({**constants, "archive/data.pkl": b"\xff\xff\xff"})
    yield "bomb.pt", archive({"archive/data.pkl": bytes(300_000_000), "archive/version": b"3\n"})
    yield "script_bomb.pt", archive({**constants, "archive/data.pkl": bytes(300_000_000)})
    yield "folder.pt", lambda path: path.mkdir()
    yield "text.pt", lambda path: path.write_text("hello")
    yield "page.pth", lambda path: path.write_text("<html>")
    yield "empty.safetensors", lambda path: path.write_bytes(b"")
    yield "long_header.safetensors", lambda path: path.write_bytes(struct.pack("<Q", 2**62) + b"{}")
    entry = b'{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'
    overlap = b'{"a":' + entry + b',"b":' + entry + b"}"
    yield "overlap.safetensors", header(overlap)
    yield (
        "overflow.safetensors",
        header(b'{"a":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,0]}}'),
    )


def _pickles(published: dict[str, Any], witness: Path) -> Iterator[tuple[str, Write]]:
    content = {"state_dict": published, "x": _Code(witness)}
    yield "code.pt", lambda path: torch.save(content, path)
    yield "code_legacy.pt", lambda path: torch.save(content, path, _use_new_zipfile_serialization=False)
    for extension in ("pkl", "pth", "safetensors"):
        yield (
            f"code.{extension}",
            lambda path: path.write_bytes(pickle.dumps({"model": {"a": _Code(witness)}})),
        )
    yield "module.pt", lambda path: torch.save(torch.nn.Linear(2, 2), path)
