"""The commands that the READMEs print: run in short, or checked as far as their missing data allow."""

import copy
import re
import runpy
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clipdense.run.setup import load_config

from detectron2.data import DatasetCatalog, MetadataCatalog

ROOT = Path(__file__).resolve().parents[2]
# tests/e2e/test_own_data.py runs the commands of docs/own_data.md.
READMES = [
    path.relative_to(ROOT).as_posix()
    for pattern in ("README.md", "projects/*/README.md", "docs/*.md", "datasets/README.md")
    for path in sorted(ROOT.glob(pattern))
    if path.name != "own_data.md"
]

# Why a command is not run here: the first pattern that a command matches.
NOT_RUN = {
    r"^make (test|env)": "it is what runs this test, or comes before it",
    r"^pip ": "installs packages; tests/test_install.py builds the wheel",
    r"--ray ": "needs a cluster; tests/e2e/test_ray.py starts one",
    r"anna/": "needs the hub; tests/run/test_hub.py pushes and pulls with a stand-in",
    r"reproduce (?!--dry-run)": "needs full-size datasets; tests/run/test_reproduce.py runs a row",
    r"with_clipdense\.py|projects/PlugIn/": "tests/e2e/test_plug_in.py and test_detectron2_tools.py run it",
    r"birds/": "tests/e2e/test_own_json.py runs it on data of that layout",
    r"projects/\w+/configs|configs/coco|<": "needs full-size datasets or weights",
    r"convert_checkpoint|EVA02": "needs published weights; test_convert_checkpoint.py runs the tool",
    r"--pretrained openai": "needs published weights; test_clipdense_command.py runs it with a small file",
    r"my\.yaml|check_data.py --dataset coco": "needs COCO; test_own_data.py runs `clipdense data check`",
    r"my_run|output/birds": "needs trained models; tests of exports and reports make some",
    r"run_zero_shot\.py": "takes minutes, or needs weights; tests/e2e/test_zero_shot.py runs the tool",
    r"run_table\.py": "takes hours; tests/e2e/test_run_table.py runs the tool",
    r"benchmark\.py": "takes minutes; tests/e2e/test_benchmark.py runs the tool",
    r"^torchrun": "starts further processes; tests/engine/test_processes.py does so",
    r"pack_nano": "replaces the weights of the package; tests/clip/test_nano.py packs into another folder",
    r"draw_neighbours": "needs a model of a table; tests/e2e/test_dense_tools.py runs the tool",
    r"\$": "is part of a loop over seeds",
}
# Options that change nothing but the time that a command takes.
SHORT = {
    "train_net.py": "SOLVER.MAX_ITER 2 SOLVER.IMS_PER_BATCH 2 SOLVER.WARMUP_ITERS 0 TEST.EVAL_PERIOD 0",
    "evaluate_regions.py": "--images 2",
    "dense_clusters.py": "--images 2",
    "make_shapes.py": "--images 2",
    "tune_ensemble.py": "--alpha 0.4 --beta 0.4,0.8",
}

pytestmark = pytest.mark.usefixtures("small_shapes")


@dataclass(frozen=True)
class Command:
    readme: str
    text: str

    @property
    def reason(self) -> str | None:
        return next((why for pattern, why in NOT_RUN.items() if re.search(pattern, self.text)), None)

    @property
    def words(self) -> list[str]:
        return shlex.split(self.text, comments=True)


def commands(readme: str) -> list[Command]:
    """The commands in a README's fenced blocks, with continued lines joined."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", (ROOT / readme).read_text(), re.M | re.S)
    lines = [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    start = re.compile(r"(\w+=\S+ )*(python|torchrun|make|clipdense|pip) ")
    return [Command(readme, line) for line in lines if start.match(line)]


EVERY = [command for readme in READMES for command in commands(readme)]


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout without outputs, with two photos, as the current folder."""
    for name in ("configs", "projects", "tools", "clipdense"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "photos").mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (2, 64, 80, 3), dtype=np.uint8)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / "photos" / f"{i}.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run ``python TOOL ...`` or ``clipdense ...`` in this process, in short."""
    if words[0] == "clipdense":
        words = ["python", str(ROOT / "clipdense/__main__.py"), *words[1:]]
    if words[0] == "make":
        recipe = re.search(rf"^{words[1]}:.*\n\t.*python (.*)$", (ROOT / "Makefile").read_text(), re.M)
        assert recipe is not None
        words = ["python", *shlex.split(recipe[1])]
    tool = words[1]
    monkeypatch.setattr(sys, "argv", [*words[1:], *SHORT.get(Path(tool).name, "").split()])
    catalogs = dict(DatasetCatalog.data), copy.deepcopy(MetadataCatalog.data)
    try:
        runpy.run_path(tool, run_name="__main__")
    except SystemExit as end:
        assert not end.code, f"{shlex.join(words)} ended with {end.code}"
    finally:
        DatasetCatalog.data, MetadataCatalog.data = catalogs


@pytest.mark.slow
def test_commands_run(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after the other, as a command may need what earlier ones have written."""
    for command in EVERY:
        if command.reason is None:
            run(command.words, monkeypatch)
    models = {path.parent.name for path in workplace.rglob("model_final.pth")}
    assert {"demo", "clipself_vit_proposals", "fvlm_rn", "fvlm_vit"} <= models


@pytest.mark.parametrize(
    "command", [c for c in EVERY if c.reason], ids=lambda c: f"{c.readme}: {c.text[:70]}"
)
def test_files_and_keys_exist(command: Command) -> None:
    """Of a command that is not run: the files of this repository that it names, and the keys that it sets."""
    words = [word for word in command.words if "$" not in word]
    named = [w for w in words if re.match(r"(configs|projects|tools)/.*\.\w+$", w)]
    assert [name for name in named if not (ROOT / name).is_file()] == []
    configs = [name for name in named if name.endswith(".yaml") and "/configs/" in f"/{name}"]
    keys = [i for i, word in enumerate(words) if re.fullmatch(r"[A-Z][A-Z_]+(\.[A-Z0-9_]+)+", word)]
    files = re.compile(r"\.(WEIGHTS|PRETRAINED|ADAPTED_CLIP|COCO_JSON)$")
    overrides = [w for i in keys if not files.search(words[i]) for w in words[i : i + 2]]
    for config in configs:
        if "PlugIn" not in config:
            load_config(str(ROOT / config), overrides)


def test_every_reason_is_needed() -> None:
    unused = [p for p in NOT_RUN if not any(re.search(p, command.text) for command in EVERY)]
    assert unused == []


@pytest.mark.parametrize("word", ["load_clip(", "clipdense.segment("])
def test_python_snippets_run(word: str, workplace: Path) -> None:
    """From a file to a picture, as printed."""
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    (block,) = [block for block in blocks if word in block]
    exec(compile(block, "README.md", "exec"), {})
    (picture,) = [*workplace.glob("labels.png"), *workplace.glob("output/one/*.jpg")]
    assert len(np.unique(np.asarray(Image.open(picture)))) > 1
