"""Export of models to ONNX and .pt2 files, and a runner of ONNX files that needs no torch.

`api` is what ``clipdense export`` does. One file a family of models says how it becomes a function of tensors
(`names`, `semantic`, `catseg`, `masks`, `two_stage`, `detection`); `families` lists them. `runner`, `arrays`,
`text_input` and `file_metadata` import neither torch nor the rest of clipdense.
"""
