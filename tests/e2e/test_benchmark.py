"""`tools/benchmark.py` and what suites are made of."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import benchmarks
import pytest
import torch
from benchmarks import (
    Row,
    flops,
    interleaved,
    load_suite,
    peak_memory,
    suite_options,
    suites,
    table,
    wall,
)
from benchmarks.evaluation import synthetic_coco

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tool() -> Any:
    spec = importlib.util.spec_from_file_location("benchmark_tool", ROOT / "tools" / "benchmark.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_evaluation_suite(tool: Any, tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "out" / "benchmark.json"
    assert tool.main(["evaluation", "--images", "20", "--pairs", "1", "--json", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "eval/coco20" in printed and "1 pairs instead of 7" in printed and "x as fast" in printed
    content = json.loads(path.read_text())
    (row,) = content["rows"]
    assert content["suite"] == "evaluation" and content["machine"]["torch"] == torch.__version__
    assert row["ratio"] == pytest.approx(row["other"] / row["ours"]) and row["ratio_is"] == "other / ours"
    assert row["ours"] == min(row["raw"]["ours"]) and len(row["raw"]["other"]) == 1
    # the numbers are those of both, not copies of each other
    for task in ("bbox", "segm"):
        assert row["values"]["ours"][task] == pytest.approx(row["values"]["other"][task], abs=1e-9)
        assert 1 < row["values"]["ours"][task]["AP"] < 99
        assert f"{row['values']['ours'][task]['AP']:.10f}" in printed


def test_ovseg_suite(tool: Any, tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "benchmark.json"
    words = ["ovseg", "--size", "60", "80", "--masks", "5", "--pairs", "1", "--rows", "crop_stage", "k847"]
    assert tool.main([*words, "--json", str(path)]) == 0
    crops, memory = json.loads(path.read_text())["rows"]
    assert (crops["name"], memory["name"]) == ("ovseg/crop_stage", "ovseg/k847_extra_gb")
    assert crops["ratio_is"] == "other / ours" and len(crops["raw"]["other"]) == 1
    assert memory["other"] == pytest.approx(847 * 60 * 80 * 4 / 1e9) and memory["ours"] > 0
    capsys.readouterr()


def test_ovseg_forwards(tool: Any, tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "benchmark.json"
    words = ["ovseg", "--config-file", str(ROOT / "configs" / "shapes" / "ovseg.yaml"), "--pairs", "1"]
    words += ["--size", "128", "160", "--masks", "4", "--rows", "end_to_end", "bf16", "pruned"]
    assert tool.main([*words, "--json", str(path)]) == 0
    rows = {row["name"]: row for row in json.loads(path.read_text())["rows"]}
    assert list(rows) == [f"ovseg/{x}" for x in ("end_to_end_flops", "end_to_end", "bf16", "pruned")]
    assert 1 <= rows["ovseg/end_to_end_flops"]["ratio"] < 1.2
    rounded, pruned = (rows[f"ovseg/{x}"]["values"] for x in ("bf16", "pruned"))
    assert rounded["crops"] == 4 and 0 < rounded["logits_mean_change"] <= rounded["logits_max_change"] < 20
    assert pruned["crops"] == 2 and pruned["logits_max_change"] < 1e-3
    assert "CLIP embeds 2 of 4 masks" in capsys.readouterr().out


@pytest.mark.slow
def test_denseclip_suite(tool: Any, tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "benchmark.json"
    words = ["denseclip", "--clip", "shapes-rn", "--size", "128", "--batch", "1", "--flops-only"]
    assert tool.main([*words, "--json", str(path)]) == 0
    inference, train = json.loads(path.read_text())["rows"]
    assert (inference["name"], train["name"]) == ("denseclip/inference_flops", "denseclip/train_step_flops")
    # The heads of both see the same regions, so that language alone makes the difference.
    assert 1 < inference["ratio"] < 1.05 and 1 < train["ratio"] < 1.2
    assert inference["other"] > 100 and not inference["raw"]
    capsys.readouterr()


@pytest.mark.slow
def test_denseclip_seg_suite(tool: Any, tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "benchmark.json"
    config = "configs/shapes/denseclip_semantic_fpn_rn.yaml"
    words = ["denseclip_seg", "--config-file", config, "--size", "64", "96", "--window", "64"]
    assert tool.main([*words, "--flops-only", "--json", str(path)]) == 0
    parameters, windows, trunk, inference = json.loads(path.read_text())["rows"]
    assert parameters["name"] == "denseclip_seg/parameters" and parameters["ratio"] > 1
    assert [row["name"] for row in (windows, trunk, inference)] == [
        f"denseclip_seg/{name}_flops" for name in ("windows", "trunk", "inference")
    ]
    # the floor with CLIP's image embedding costs more than the trunk alone
    assert trunk["ours"] == inference["ours"] and inference["other"] > trunk["other"]
    # the context decoder, of full size, costs several times as much as the nano trunk
    assert 1 <= windows["ratio"] < 1.1 and 4 < inference["ratio"] < 7
    assert windows["other"] > 1.9 * inference["ours"]  # two windows
    assert tool.main([*words, "--device", "meta", "--json", str(path)]) == 0
    counted = json.loads(path.read_text())["rows"]
    assert [row["ours"] for row in counted] == [
        row["ours"] for row in (parameters, windows, trunk, inference)
    ]
    with pytest.raises(ValueError, match="has no sliding windows: give --window"):
        tool.main(["denseclip_seg", "--config-file", config])
    capsys.readouterr()


@pytest.mark.slow
def test_catseg_suite_without_computing(tool: Any, tmp_path: Path, capsys: Any) -> None:
    """Early rejection saves the aggregation of the classes that are left out, and no more."""
    path = tmp_path / "benchmark.json"
    config = str(ROOT / "configs" / "shapes" / "catseg_vit.yaml")
    words = ["catseg", "--config-file", config, "--size", "64", "64", "--classes", "20", "--device", "meta"]
    shares = []
    for kept in ("20", "5"):
        options = ["--rows", "rejection", "--kept", kept, "--flops-only", "--json", str(path)]
        assert tool.main([*words, *options]) == 0
        (row,) = json.loads(path.read_text())["rows"]
        shares.append(row["ratio"])
    assert shares[0] == pytest.approx(1, abs=0.05) and 0 < shares[1] < shares[0]
    capsys.readouterr()


@pytest.mark.slow
def test_clipself_suite(tool: Any, tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "benchmark.json"
    words = ["clipself", "--clip", "shapes-vit", "--size", "128", "--pairs", "1"]
    assert tool.main([*words, "--json", str(path)]) == 0
    cost, time = json.loads(path.read_text())["rows"]
    assert (cost["name"], time["name"]) == ("clipself/step_flops", "clipself/step_wall")
    assert 1 <= cost["ratio"] < 1.05 and cost["other"] > 1
    assert 0 <= time["values"]["data_wait"] <= 1 and "waits for data" in capsys.readouterr().out


@pytest.mark.slow
def test_fvlm_suite(tool: Any, tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "benchmark.json"
    config = str(ROOT / "configs" / "shapes" / "fvlm_vit.yaml")
    words = ["fvlm", "--config-file", config, "--size", "128", "--flops-only"]
    assert tool.main([*words, "--json", str(path)]) == 0
    few, many, memory = json.loads(path.read_text())["rows"]
    assert (few["name"], many["name"]) == ("fvlm/k80_flops", "fvlm/k1203_flops")
    assert 1 < few["ratio"] < many["ratio"]
    # a frozen trunk leaves nothing behind for the backward pass
    assert memory["name"] == "fvlm/train_memory" and memory["ratio"] < 1.2
    capsys.readouterr()


def test_peak_memory() -> None:
    def chain() -> None:
        x = torch.ones(1000)
        for _ in range(5):
            x = x + 1  # the one before is freed when the name moves on

    def in_place() -> None:
        x = torch.ones(1000)
        x.add_(1)
        x[:10].view(-1)

    w = torch.ones(1000, requires_grad=True)

    def graph() -> None:
        (w * torch.ones(1000)).exp().sum().backward()

    assert peak_memory(chain) == 8000 and peak_memory(in_place) == 4000
    # ones, product and exponential are all kept for the backward pass
    assert peak_memory(graph) >= 12000


def test_the_suite_fails_where_numbers_differ(tool: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    suite = load_suite("evaluation")
    right = suite.hotcoco_metrics

    def wrong(*args: Any) -> Any:
        metrics = right(*args)
        metrics["segm"]["AP75"] += 1e-6
        return metrics

    monkeypatch.setattr(suite, "hotcoco_metrics", wrong)
    with pytest.raises(AssertionError, match="segm AP75"):
        tool.main(["evaluation", "--images", "3", "--pairs", "1"])


def test_suites_are_listed_and_others_are_errors(tool: Any, capsys: Any) -> None:
    assert tool.main(["--list"]) == 0
    printed = capsys.readouterr().out
    assert "evaluation" in suites() and all(name in printed for name in suites())
    assert "Suite ``evaluation``" in printed
    for arguments in ([], ["nonsense"]):
        with pytest.raises(SystemExit):
            tool.main(arguments)
        assert "name a suite: " in capsys.readouterr().err
    with pytest.raises(ValueError, match="no benchmark suite 'nonsense'; there are .*evaluation"):
        load_suite("nonsense")


def test_a_module_of_the_package_is_a_suite(
    tool: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    (tmp_path / "pooling.py").write_text(
        '"""Suite ``pooling``: sums."""\n'
        "from benchmarks import Row\n"
        "def add_arguments(parser): parser.add_argument('--size', type=int)\n"
        "def rows(args): yield Row('pooling/sum', args.size, 4, 'GFLOP', notes='counted')\n"
    )
    monkeypatch.setattr(benchmarks, "__path__", [*benchmarks.__path__, str(tmp_path)])
    monkeypatch.setattr(tool, "SUITES", [*tool.SUITES, "pooling"])
    assert tool.main(["pooling", "--size", "5"]) == 0
    printed = capsys.readouterr().out
    assert "1.25" in printed and "x the cost" in printed and "pooling/sum: counted" in printed


def test_ratios() -> None:
    assert Row("a", 2.0, 4.0, "s").ratio == 0.5
    assert Row("a", 2.0, 4.0, "s", "speedup").ratio == 2.0
    assert Row("a", 0.0, 4.0, "s", "speedup").to_json()["ratio"] != 0
    assert "12,345" in table([Row("a", 12345.0, 0.00012, "GFLOP")])


def test_export_suite(tool: Any, tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "benchmark.json"
    words = ["export", "--models", "shapes-vit", "--size", "64", "80", "--classes", "3", "--pairs", "1"]
    assert tool.main([*words, "--json", str(path)]) == 0
    (row,) = json.loads(path.read_text())["rows"]
    assert (row["name"], row["ratio_is"]) == ("export/shapes-vit", "other / ours")
    assert row["values"]["difference"] < 1e-4 and row["values"]["megabytes"] > 1
    assert "torch eager" in capsys.readouterr().out


def test_flops_are_exact() -> None:
    a, b = torch.ones(3, 5), torch.ones(5, 7)
    assert flops(lambda: a @ b) == 2 * 3 * 5 * 7
    convolution = torch.nn.Conv2d(3, 4, 3, bias=False)
    assert flops(lambda: convolution(torch.ones(1, 3, 10, 10))) == 2 * 4 * 8 * 8 * 3 * 9


def test_pairs_are_interleaved() -> None:
    order: list[str] = []
    times = list(interleaved(lambda: order.append("a"), lambda: order.append("b"), pairs=3))
    assert order == ["a", "b"] * 4 and len(times) == 3  # the first pair warms up
    row = wall("x/y", lambda: None, lambda: None, pairs=2)
    assert row.ours == min(row.raw["ours"]) and "2 pairs instead of 7" in row.notes
    assert wall("x/y", lambda: None, lambda: None).notes == ""


def test_synthetic_data_are_the_same_for_a_seed() -> None:
    first, second, other = synthetic_coco(3), synthetic_coco(3), synthetic_coco(3, seed=1)
    assert first == second and first != other
    dataset, results = synthetic_coco(60)
    counts = [sum(a["image_id"] == i["id"] for a in dataset["annotations"]) for i in dataset["images"]]
    assert 5 < sum(counts) / 60 < 10 and 30 < len(results) / 60 < 42
    assert len({r["score"] for r in results}) < len(results)  # ties occur
    assert any(a["iscrowd"] for a in dataset["annotations"])


def test_all_names_every_suite(tool: Any, capsys: Any) -> None:
    assert tool.main(["all", "--list"]) == 0
    printed = capsys.readouterr().out
    assert all(f"\n{name} " in f"\n{printed}" for name in suites())
    assert printed.count("full: ") == printed.count("reduced: ") == len(suites())
    assert {"catseg", "denseclip_seg", "fcclip", "zero_shot"} <= set(suites())
    parsed = [tool.parse_arguments([n, *suite_options(n, s)]) for n in suites() for s in ("full", "reduced")]
    assert [args.suite for args in parsed] == [name for name in suites() for _ in range(2)]


def test_all_runs_suites_and_reports_the_one_that_fails(
    tool: Any, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(args: Any) -> Any:
        yield Row("evaluation/first", 1.0, 2.0, "s")
        raise RuntimeError("no data")

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(load_suite("evaluation"), "rows", fail)
    path = tmp_path / "benchmark.json"
    words = ["all", "--device", "cpu", "--suites", "evaluation", "clipself", "--json", str(path)]
    monkeypatch.setattr(
        load_suite("clipself"), "REDUCED", ("--clip", "shapes-vit", "--size", "64", "--pairs", "1")
    )
    assert tool.main(words) == 1
    content = json.loads(path.read_text())
    assert content["errors"] == {"evaluation": "RuntimeError: no data"} and content["scale"] == "reduced"
    assert content["machine"]["device"] == "cpu" and content["machine"]["date"]
    first, cost, time = content["rows"]
    assert [row["name"] for row in (first, cost)] == ["evaluation/first", "clipself/step_flops"]
    assert time["images_per_second"] == pytest.approx(1 / time["ours"]) and cost["images_per_second"] is None
    # the memory of a step holds at least the gradients
    assert 0.5 < time["peak_gb"]["ours"] / time["peak_gb"]["other"] < 2 and time["peak_gb"]["ours"] > 1e-3
    printed = capsys.readouterr()
    assert "images/s" in printed.out and "peak GB" in printed.out
    assert "error: suite evaluation: RuntimeError: no data" in printed.err


def test_devices_that_cannot_be_used_are_errors(tool: Any) -> None:
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="there is no GPU; use --device cpu"):
            tool.main(["all", "--device", "cuda"])
    with pytest.raises(ValueError, match="clipself has no rows without computing"):
        tool.main(["clipself", "--device", "meta"])
