"""Deployment: fold batch-norms, quantize to int8, and write networks as ONNX, OpenVINO or torch.export files."""
