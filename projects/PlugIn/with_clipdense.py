"""Run a script of Detectron2, or of a project, as if it had clipdense's two lines.

python projects/PlugIn/with_clipdense.py tools.analyze_model --tasks parameter --config-file ...
python projects/PlugIn/with_clipdense.py path/to/detectron2/tools/analyze_model.py --tasks parameter ...

Options after the script are the script's: `tools.analyze_model --help` prints those of analyze_model.
"""

import runpy
import sys

if __name__ == "__main__" and len(sys.argv) > 1 and sys.argv[1] in ("-h", "--help"):
    print(
        f"usage: {sys.argv[0]} SCRIPT.py|MODULE [ARGUMENTS]\n\n{__doc__}"
    )  # before the imports that take seconds
    sys.exit(0)

import clipdense
from clipdense.backbone.flops import FlopCountAnalysis

import detectron2.config
import detectron2.utils.analysis
from detectron2.config import CfgNode, get_cfg


def get_cfg_with_clipdense() -> CfgNode:
    """Return Detectron2's defaults and clipdense's."""
    cfg = get_cfg()
    clipdense.add_clipdense_config(cfg)
    return cfg


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(f"usage: {sys.argv[0]} SCRIPT.py|MODULE ...")
    detectron2.config.get_cfg = get_cfg_with_clipdense
    detectron2.utils.analysis.FlopCountAnalysis = FlopCountAnalysis  # counts fused attention too
    sys.argv = sys.argv[1:]
    if sys.argv[0].endswith(".py"):
        runpy.run_path(sys.argv[0], run_name="__main__")
    else:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
