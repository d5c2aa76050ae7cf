"""One trainer for everything; `tools/train_net.py` is a thin shell around it."""
