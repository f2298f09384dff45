# Runs model.onnx beside this file.
from fides_plugins.serving.triton.onnx_service import TritonPythonModel as TritonPythonModel
