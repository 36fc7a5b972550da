"""Networks as files that other runtimes execute: ONNX in float32 and int8, and what is known of each file."""
