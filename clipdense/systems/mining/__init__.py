"""Mining of mask-text pairs from captions (OVSeg, Liang et al., CVPR 2023, section 3.2)."""
