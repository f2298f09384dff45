# Answers with references; settings are the parameters `fides.*` of config.pbtxt.
from fides_plugins.serving.triton.entry import Verify as TritonPythonModel
