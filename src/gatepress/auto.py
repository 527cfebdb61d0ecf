"""Import me and the Auto classes know pruned models: `import gatepress.auto`.

Registering is the only side effect that importing a gatepress module has.
"""

from transformers import AutoConfig, AutoModelForSequenceClassification

from gatepress.families import FAMILIES
from gatepress.resolve import model_class

for _family in FAMILIES.values():
    _model = model_class(_family)
    AutoConfig.register(_model.config_class.model_type, _model.config_class, exist_ok=True)
    AutoModelForSequenceClassification.register(_model.config_class, _model, exist_ok=True)
    # save_pretrained of a loaded model then ships the code again, so that a copy reloads as well.
    _model.config_class.register_for_auto_class()
    _model.register_for_auto_class("AutoModelForSequenceClassification")
