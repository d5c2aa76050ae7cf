"""`clipdense report` on the output folders of tiny runs."""

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from clipdense.run.reporting import write_report
from clipdense.visualization.report.build import Options
from tests.helpers.browser import open_page
from tests.helpers.tiny_runs import DETECTIONS, detector_run

OPTIONS = Options(images=1, bootstrap=10)


@pytest.fixture
def run(tmp_path: Path, catalogs: None) -> Path:
    return detector_run(tmp_path / "first", tmp_path / "data", "report_tiny")


class Page(HTMLParser):
    """Headings and texts of a page, and the addresses that it refers to."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.texts: list[str] = []
        self.feed(path.read_text())
        self.text = " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.addresses += [value or "" for name, value in attributes if name in ("src", "href", "action")]

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_a_report_has_every_section_and_no_outside_address(run: Path) -> None:
    path = write_report([run], options=OPTIONS)
    assert path == run / "report.html"
    page = Page(path)
    for heading in (
        "Summary",
        "Training curves",
        "Classes",
        "Confusion",
        "Precision and recall",
        "Kinds of errors",
        "Size and frequency",
        "Images",
        "Config and environment",
    ):
        assert heading in page.texts, heading
    assert "40.25" in page.texts and "report_tiny, boxes:" in page.texts
    assert "torch 2.0 <of this test>" in page.text  # escaped in the file
    assert page.addresses and all(address.startswith(("data:", "#")) for address in page.addresses)
    assert not re.search(r"url\(|@import|<link rel=.stylesheet", path.read_text())


def test_two_runs_stand_side_by_side(run: Path, tmp_path: Path) -> None:
    other = detector_run(tmp_path / "second", tmp_path / "data", "report_tiny", DETECTIONS[:1])
    page = Page(write_report([run, other], tmp_path / "both.html", OPTIONS))
    assert "Differences" in page.texts and "AP, second" in page.texts
    assert "10 bootstrap samples" in page.text
    assert "Of 6 images, 0 are better in second" in page.text
    assert "differences of config.yaml" in page.texts


def test_recorded_metrics_of_classes_are_a_table_of_their_own(run: Path) -> None:
    (run / "results.json").write_text('{"panoptic_seg/PQ": 30.0, "panoptic_seg/PQ-sea-side": 12.34}')
    page = Page(write_report([run], options=OPTIONS))
    assert "Classes, PQ" in page.texts and "sea-side" in page.texts and "12.3" in page.texts
    assert "panoptic_seg/PQ-sea-side" not in page.texts


def test_what_is_missing_is_said(run: Path, tmp_path: Path) -> None:
    results = run / "inference" / "report_tiny" / "coco_instances_results.json"
    results.rename(results.with_name("other.json"))
    (run / "metrics.json").unlink()
    (run / "results.json").unlink()
    (run / "inference" / "unknown").mkdir()
    page = Page(write_report([run], options=OPTIONS))
    assert "first has no results.json: the run was not evaluated." in page.text
    assert "There is no metrics.json with losses" in page.text
    assert "There are neither detections (coco_instances_results.json) nor label maps" in page.text
    assert "no dataset of this name is registered" in page.text


def test_a_run_without_config_or_data_gets_a_report(run: Path, tmp_path: Path) -> None:
    for image in (tmp_path / "data").glob("*.png"):
        image.unlink()
    text = Page(write_report([run], options=OPTIONS)).text
    assert "This part is not available" in text and str(tmp_path / "data") in text
    (run / "config.yaml").write_text("NO_SUCH_KEY: 1\n")
    page = Page(write_report([run], options=OPTIONS))
    assert "NO_SUCH_KEY" in page.text
    (run / "config.yaml").unlink()
    assert "Summary" in Page(write_report([run], options=OPTIONS)).texts


def test_missing_annotations_are_named(run: Path, tmp_path: Path) -> None:
    (tmp_path / "data" / "a.json").unlink()
    text = Page(write_report([run], options=OPTIONS)).text
    assert "The ground truth is not available: first: " in text and "a.json" in text


def test_runs_on_other_datasets_are_not_compared(run: Path, tmp_path: Path) -> None:
    other = detector_run(tmp_path / "second", tmp_path / "more", "report_other")
    page = Page(write_report([run, other], options=OPTIONS))
    assert "no dataset in common: first has report_tiny and second has report_other" in page.text


def test_a_folder_that_is_no_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="not the output folder of a run"):
        write_report([tmp_path])


def test_tables_are_sorted_in_a_browser(run: Path) -> None:
    path = write_report([run], options=OPTIONS)
    with open_page(path.as_uri(), path.as_uri()) as visit:
        table = visit.page.locator("section", has=visit.page.locator("h2", has_text="Classes")).locator(
            "table"
        )

        def column(number: int) -> list[str]:
            return table.locator(f"tbody td:nth-child({number})").all_inner_texts()

        assert column(1) == ["cat", "dog", "bird", "fish"]
        table.locator("th", has_text="class").click()
        assert column(1) == ["fish", "dog", "cat", "bird"]
        table.locator("th", has_text="class").click()
        assert column(1) == ["bird", "cat", "dog", "fish"]
        heading = table.locator("th").nth(2)
        heading.click()
        falling = column(3)
        assert falling[-1] == "\u2013" and falling[:3] == sorted(falling[:3], key=float, reverse=True)
        heading.click()
        assert column(3) == [*reversed(falling[:3]), "\u2013"]
        widths = "images => images.map(image => image.naturalWidth)"
        assert min(visit.page.locator("img").evaluate_all(widths)) > 0
    assert not visit.refused and not visit.errors
