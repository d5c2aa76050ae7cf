"""Execute the notebooks: each .py beside this file becomes an .ipynb with its outputs.

python docs/notebooks/execute.py            # all of them, into this folder
python docs/notebooks/execute.py own_photos --output /tmp
"""

import argparse
from pathlib import Path

FOLDER = Path(__file__).resolve().parent


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = sorted(path.stem for path in FOLDER.glob("own_*.py"))
    parser.add_argument("notebooks", nargs="*", default=names, help=f"names (default: {' '.join(names)})")
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder to write to")
    return parser.parse_args()


def execute(source: Path, target: Path) -> None:
    """Execute a notebook in jupytext's percent format, and write it with its outputs."""
    import jupytext
    import nbformat
    from nbclient import NotebookClient

    notebook = jupytext.read(source)
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number}"
    NotebookClient(notebook, timeout=1200, kernel_name="python3").execute(cwd=str(FOLDER))
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = [
                output for output in cell.outputs if output.output_type != "stream" or output.name == "stdout"
            ]
    notebook.metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}
    nbformat.write(notebook, target)


if __name__ == "__main__":
    arguments = parse_arguments()
    for name in arguments.notebooks:
        execute(FOLDER / f"{name}.py", arguments.output / f"{name}.ipynb")
