"""Config files: `_BASE_`, safe tags, and errors that name the file."""

import re
from pathlib import Path

import pytest
import yaml

from clipdense.engine.options import ConfigError
from clipdense.run.config_file import merge_config_file, read_config_file
from clipdense.run.setup import load_config

from detectron2.config import get_cfg


@pytest.fixture
def write(tmp_path):
    def run(**files):
        for name, text in files.items():
            data = text if isinstance(text, bytes) else text.encode()
            (tmp_path / f"{name}.yaml").write_bytes(data)
        return tmp_path / f"{next(iter(files))}.yaml"

    return run


def test_a_file_wins_over_its_bases(write):
    path = write(
        a="_BASE_: [b.yaml, c.yaml]\nSOLVER: {MAX_ITER: 3}",
        b="SOLVER: {MAX_ITER: 1, BASE_LR: 0.1}\nSEED: 5",
        c="SOLVER: {BASE_LR: 0.2}",
    )
    assert read_config_file(path) == {"SOLVER": {"MAX_ITER": 3, "BASE_LR": 0.2}, "SEED": 5}


def test_iterations_lift_the_time_limit_of_a_base(write, caplog):
    base = "SOLVER: {MAX_ITER: 5, MAX_SECONDS: 300.0}\nVERSION: 2"
    path = write(a="_BASE_: b.yaml\nSOLVER: {MAX_ITER: 9}", b=base)
    assert load_config(str(path)).SOLVER.MAX_SECONDS == 0
    assert caplog.text.count("a.yaml sets SOLVER.MAX_ITER, so SOLVER.MAX_SECONDS 300.0 of its base") == 1
    for solver in ("{MAX_ITER: 9, MAX_SECONDS: 60.0}", "{BASE_LR: 0.1}"):
        limited = load_config(str(write(a=f"_BASE_: b.yaml\nSOLVER: {solver}", b=base))).SOLVER
        expected = 60 if "MAX_SECONDS" in solver else 300
        assert expected == limited.MAX_SECONDS
    assert load_config(str(write(b=base))).SOLVER.MAX_SECONDS == 300
    assert caplog.text.count("does not apply") == 1


def test_tuples_are_kept(write):
    path = write(a="SOLVER: {STEPS: !!python/tuple [10, 20]}\nINPUT: {MIN_SIZE_TRAIN: [64]}")
    assert read_config_file(path)["SOLVER"]["STEPS"] == (10, 20)
    cfg = get_cfg()
    merge_config_file(cfg, path)
    assert cfg.SOLVER.STEPS == (10, 20)
    assert cfg.INPUT.MIN_SIZE_TRAIN == (64,)


def test_configs_of_version_1_are_upgraded(write):
    cfg = get_cfg()
    merge_config_file(cfg, write(a="VERSION: 1\nMODEL: {WEIGHT: w.pth}"))
    assert cfg.MODEL.WEIGHTS == "w.pth"


def test_an_unknown_version_is_refused(write):
    for version in ("3", "x", "0", "True"):
        with pytest.raises(ConfigError, match=r"a\.yaml: VERSION is .*; expected 2"):
            merge_config_file(get_cfg(), write(a=f"VERSION: {version}"))


def test_no_tag_runs_code(write, tmp_path):
    mark = tmp_path / "ran"
    tag = f"OUTPUT_DIR: !!python/object/apply:os.system ['touch {mark}']\n"
    for path in (write(a=tag), write(b="_BASE_: a.yaml")):
        with pytest.raises(ConfigError, match=r"a\.yaml: line 1: .*python/object"):
            read_config_file(path)
    assert not mark.exists()
    yaml.unsafe_load(tag)  # the control: the tag does run where it is let
    assert mark.exists()


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "empty"),
        ("- 1\n", "not list"),
        ("hello", "not str"),
        ("5: 6\n", "key 5 is not text"),
        ("[" * 20000, "nested too deeply|not valid YAML"),
        ("MODEL: {", "not valid YAML"),
        (b"MODEL: \xff\xfe", "UTF-8"),
        ("_BASE_: a.yaml\n", "includes it"),
        ("_BASE_: 5\n", "_BASE_ is 5"),
        ("_BASE_:\n", "_BASE_ is None"),
        ("_BASE_: /tmp\n", "not a .yaml file"),
        ("_BASE_: /etc/passwd\n", "not a .yaml file"),
        ("_BASE_: nothere.yaml\n", "nothere.yaml, which does not exist"),
        ("_BASE_: http://localhost:9/x.yaml\n", "is a URL"),
        ("DATASETS: &a\n  TRAIN: *a\n", "contains itself"),
        ("DATASETS: &a\n  TRAIN: [*a]\n", "contains itself"),
    ],
)
def test_errors_name_the_file(write, text, message):
    with pytest.raises(ConfigError, match=rf"a\.yaml: .*(?:{message})"):
        read_config_file(write(a=text))


def test_a_circle_of_files(write):
    with pytest.raises(ConfigError, match=r"a\.yaml: _BASE_ names a file that includes it"):
        read_config_file(write(a="_BASE_: b.yaml", b="_BASE_: a.yaml"))


def test_a_node_cannot_become_a_value(write):
    with pytest.raises(ConfigError, match=r"a\.yaml: SOLVER holds keys in the base config, but is 5"):
        read_config_file(write(a="_BASE_: b.yaml\nSOLVER: 5", b="SOLVER: {MAX_ITER: 1}"))


@pytest.mark.parametrize("value", ["", " 5", " [1]", " text"])
def test_a_group_of_keys_stays_one(write, value):
    with pytest.raises(ConfigError, match=r"a\.yaml: MODEL\.CLIP is a group of keys"):
        load_config(str(write(a=f"MODEL:\n  CLIP:{value}\n")))


def test_wrong_types_are_described_in_a_line(write):
    for text, key in (
        ("SOLVER: {MAX_ITER: many}", "SOLVER.MAX_ITER"),
        ("MODEL: {MASK_ON: [1]}", "MODEL.MASK_ON"),
    ):
        with pytest.raises(ConfigError, match=rf"a\.yaml: {key} has a value of the wrong type") as error:
            load_config(str(write(a=text)))
        assert len(str(error.value)) < 250
    with pytest.raises(ConfigError, match="the command line: MODEL.CLIP has a value of the wrong type"):
        load_config(str(write(a="SEED: 1")), ["MODEL.CLIP", "5"])


def test_no_yaml_file_is_read_unsafely():
    """LazyConfig files (.py) run code by design; YAML files never do."""
    unsafe = re.compile(
        r"unsafe_load|full_load|allow_unsafe=True|FullLoader|UnsafeLoader|merge_from_file\(\w*\.?config_file"
    )
    root = Path(__file__).resolve().parents[2]
    files = [
        p for folder in ("clipdense", "tools", "datasets", "projects") for p in (root / folder).rglob("*.py")
    ]
    assert len(files) > 100
    assert [str(path) for path in files if unsafe.search(path.read_text())] == []
