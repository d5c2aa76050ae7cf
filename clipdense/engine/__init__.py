"""Training and evaluation of any model; `tools/train_net.py` is the command."""
