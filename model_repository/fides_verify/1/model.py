# Answers with references; settings are the parameters `fides.*` of config.pbtxt.
from fides_plugins.serving.triton.verify import TritonPythonModel as TritonPythonModel
