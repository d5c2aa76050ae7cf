"""Text tables, class lists and table files of run_table."""

import io
import itertools
import json
import os
import pickle
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from tests.reliability.mutations import damage_bytes
from tests.reliability.outcomes import Case, WrongResultError
from tests.reliability.world import World

ROWS = [{"name": "r", "config": "c.yaml", "overrides": {"A": 1}, "arguments": ["--x", 1]}]
TABLE = {"output": "o", "seeds": [1, 2], "metrics": {"AP": "bbox/AP"}, "rows": ROWS, "digits": 2}
CHANGES: dict[str, dict[str, Any]] = {
    "whole": {},
    "seed_text": {"seeds": ["1"]},
    "seed_boolean": {"seeds": [True, 1]},
    "seed_negative": {"seeds": [-1]},
    "seed_list": {"seeds": [[1]]},
    "seed_float": {"seeds": [1.0]},
    "digits_negative": {"digits": -1},
    "digits_huge": {"digits": 10**6},
    "metric_list": {"metrics": {"AP": [1]}},
    "metric_null": {"metrics": {None: None}},
    "row_text": {"rows": ["a"]},
    "row_null": {"rows": [None]},
    "row_parent": {"rows": [{"name": "..", "config": "c"}]},
    "row_outside": {"rows": [{"name": "../../x", "config": "c"}]},
    "row_unnamed": {"rows": [{"name": "", "config": "c"}]},
    "row_arguments": {"rows": [{"name": "a", "config": "c", "arguments": [None, {}]}]},
    "row_unknown": {"rows": [{"name": "a", "config": "c", "overides": {}}]},
    "row_long": {"rows": [{"name": "x" * 400, "config": "c"}]},
    "row_zero": {"rows": [{"name": "a\0b", "config": "c\0"}]},
    "overrides_list": {"overrides": [1]},
}
CLASSES: dict[str, bytes] = {
    "whole.txt": b"cat, kitten\ndog\n",
    "empty.txt": b"",
    "blank.txt": b"\n \n",
    "latin1.txt": "caf\u00e9".encode("latin1"),
    "utf16.txt": "cat\ndog\n".encode("utf-16"),
    "twice.txt": b"cat\nCat\n",
    "zero.txt": b"c\0t\n",
    "commas.txt": b",,,\n",
    "whole.json": b'["cat","dog"]',
    "numbers.json": b"[1,2]",
    "mixed.json": b'["a", 1]',
    "id_text.json": b'[{"id":"x","name":"a"}]',
    "name_null.json": b'[{"id":1,"name":null}]',
    "name_number.json": b'[{"id":1,"name":5}]',
    "synonyms_number.json": b'[{"id":1,"name":"a","synonyms":5}]',
    "synonyms_text.json": b'[{"id":1,"name":"a","synonyms":"bc"}]',
    "categories_number.json": b'{"categories":5}',
    "categories_null.json": b'{"categories":null}',
    "deep.json": b"[" * 100_000,
    "format.json": b'{"format":"clipdense-vocabulary"}',
    "format_types.json": b'{"format":"clipdense-vocabulary","synonyms":5,"base":null,"thing":null}',
    "format_base.json": b'{"format":"clipdense-vocabulary","synonyms":[["a"]],"base":5,"thing":null}',
    "number.json": b"5",
    "large.json": b"[" + b"9" * 6000 + b"]",
}


class _Code:
    """Object whose pickle runs a command when it is opened."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.witness}",)


def cases(world: World, seed: int) -> Iterator[Case]:
    """Yield hand-made files, then damaged ones."""
    rng, folder = random.Random(seed), world.folder / "tables"
    folder.mkdir(exist_ok=True)
    witness = folder / "witness"

    def case(name: str, data: bytes, use: Callable[[Path], object]) -> Case:
        path = folder / name
        path.write_bytes(data)
        return Case(name, lambda: use(path), (name,), witness=witness)

    tables = _text_tables(witness)
    for name, data in tables.items():
        yield case(f"table_{name}", data, _text_table)
    for name, data in CLASSES.items():
        yield case(f"classes_{name}", data, _classes)
    for name, changes in CHANGES.items():
        yield case(f"rows_{name}.yaml", yaml.safe_dump({**TABLE, **changes}).encode(), _run_table)
    code = f"rows: !!python/object/apply:os.system ['touch {witness}']".encode()
    for name, data in {
        "code": code,
        "list": b"- 1",
        "empty": b"",
        "unclosed": b"a: [",
        "deep": b"[" * 5000,
    }.items():
        yield case(f"rows_{name}.yaml", data, _run_table)

    whole = {
        "whole.npy": (tables["whole.npy"], _text_table),
        "whole.pt": (tables["whole.pt"], _text_table),
        "whole.safetensors": (tables["whole.safetensors"], _text_table),
        "whole.txt": (CLASSES["whole.txt"], _classes),
        "classes.json": (b'[{"id":1,"name":"a"},{"id":2,"name":"b"}]', _classes),
        "rows.yaml": (yaml.safe_dump(TABLE).encode(), _run_table),
    }
    for i in itertools.count():
        name = rng.choice(list(whole))
        kind, data = damage_bytes(whole[name][0], rng)
        yield case(f"random_{i:04d}_{kind.replace(' ', '')}_{name}", data, whole[name][1])


def _text_tables(witness: Path) -> dict[str, bytes]:
    from safetensors.torch import save

    matrix, index = torch.arange(12.0).view(3, 4) - 5.0, {"classes": ["a", "b", "c"]}

    def array(values: Any, **options: Any) -> bytes:
        file = io.BytesIO()
        np.save(file, values, **options)
        return file.getvalue()

    def saved(content: Any) -> bytes:
        file = io.BytesIO()
        torch.save(content, file)
        return file.getvalue()

    def tensors(index: str) -> bytes:
        return save({"embeddings": matrix}, {"index": index})

    values = matrix.numpy()
    return {
        "whole.npy": array(values),
        "whole.pt": saved({"embeddings": matrix, "index": index}),
        "whole.safetensors": tensors(json.dumps(index)),
        "objects.npy": array(np.array([_Code(witness), 2], dtype=object), allow_pickle=True),
        "code.npy": pickle.dumps(_Code(witness)),
        "code.pt": saved({"embeddings": matrix, "x": _Code(witness)}),
        "text.npy": array(np.array(["a", "b"])),
        "complex.npy": array(values.astype("c8")),
        "nan.npy": array(values * np.nan),
        "vector.npy": array(np.ones(3, "f4")),
        "empty.npy": array(np.ones((0, 4), "f4")),
        "nothing.npy": b"",
        "no_index.safetensors": tensors("{"),
        "index_list.safetensors": tensors("[1]"),
        "index_short.safetensors": tensors('{"classes": ["a"]}'),
        "index_numbers.safetensors": tensors('{"classes": [1, 2, 3]}'),
        "index_number.safetensors": tensors('{"classes": 5}'),
        "list.pt": saved([1]),
        "index.pt": saved({"embeddings": matrix, "index": 5}),
        "other.txt": b"abc",
    }


def _text_table(path: Path) -> str:
    from clipdense.clip.tables import TextTable

    table = TextTable.load(path, "a,b,c", dim=None)
    if not table.embeddings.isfinite().all():
        raise WrongResultError("the embeddings are not finite")
    return f"{tuple(table.embeddings.shape)}"


def _classes(path: Path) -> int:
    from clipdense.clip.vocabulary import Vocabulary

    vocabulary = Vocabulary.parse(str(path))
    if not all(isinstance(name, str) for names in vocabulary.synonyms for name in names):
        raise WrongResultError(f"class names {vocabulary.names[:3]}")
    return len(vocabulary)


def _run_table(path: Path) -> int:
    from clipdense.run.table import load_table, markdown

    table = load_table(path)
    for cell in table.cells():
        cell.command("tool")
        if not cell.folder.resolve().is_relative_to(table.output.resolve()):
            raise WrongResultError(f"the folder of a cell is {cell.folder}")
    markdown(table, "command")
    return len(table.cells())
