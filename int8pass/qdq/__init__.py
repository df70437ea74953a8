"""QDQ files: what is done with an ONNX file once it exists. Knows ONNX graphs and runtimes, no FX graph and no model.

linears   the quantized linears of a file, by any tool
rewrite   changes that are safe in every file: unsigned activations, weights transposed once, biases that fuse
runtimes  what ONNX Runtime and OpenVINO make of a file: which linears run in int8, which fell back
lint      the traps of a file, and how to fix them
files     writing a model so that there is either all of it or nothing
"""
