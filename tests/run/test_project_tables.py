"""The table files of the projects: each loads, and its configs take its overrides.

Those of tools/run_zero_shot.py have towers: tests/systems/test_zero_shot_sweep.py loads them.
"""

from pathlib import Path

import pytest
import yaml

from clipdense.run.setup import read_config
from clipdense.run.table import load_table

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted(ROOT.glob("projects/*/tables/*.yaml"))
TABLES = [path for path in FILES if "towers" not in yaml.safe_load(path.read_text())]


def name(path: Path) -> str:
    return path.relative_to(ROOT / "projects").as_posix()


def test_there_are_tables() -> None:
    assert {"DenseCLIP/tables/shapes_600.yaml", "CLIPSelf/tables/shapes_options.yaml"} <= set(
        map(name, TABLES)
    )


@pytest.mark.parametrize("path", TABLES, ids=name)
def test_table_loads(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of other tables are left out: they exist when those tables have run."""
    monkeypatch.chdir(ROOT)
    for cell in load_table(path).cells():
        words = cell.command("train_net.py")
        options = words[3 + len(cell.row.arguments) :]
        if "MODEL.WEIGHTS" in options:
            at = options.index("MODEL.WEIGHTS")
            assert options[at + 1].startswith("output/") and "{seed}" not in options[at + 1]
            del options[at : at + 2]
        cfg = read_config(words[2], options).cfg
        assert Path(cfg.OUTPUT_DIR) == cell.folder and cell.seed == cfg.SEED


def test_every_step_of_the_denseclip_recipe_differs() -> None:
    """From "cosine only" to the published form: the rows of each table have different models or losses."""
    for file in ("shapes", "shapes_600", "shapes_eighth"):
        table = load_table(ROOT / f"projects/DenseCLIP/tables/{file}.yaml")
        models = set()
        for cell in (cell for cell in table.cells() if cell.seed == table.seeds[0]):
            words = cell.command("train_net.py")
            cfg = read_config(str(ROOT / words[2]), words[3:]).cfg
            parts = (cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.TRUNK.NAME, cfg.MODEL.CLIP.PRETRAINED)
            models.add((*parts, cfg.MODEL.LANGUAGE.dump(), cfg.MODEL.PIXEL_TEXT.dump()))
        assert len(models) == len(table.rows) >= 4
