# Gives the verdict; settings are the parameters `fides.*` of config.pbtxt.
from fides_plugins.serving.triton.entry import Validate as TritonPythonModel
