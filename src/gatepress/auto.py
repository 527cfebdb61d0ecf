"""Import me and the Auto classes know pruned models: `import gatepress.auto`.

Registering is the only side effect that importing a gatepress module has.
"""

from transformers import AutoConfig, AutoModelForSequenceClassification

from gatepress import modeling_gatepress
from gatepress.families import FAMILIES

for _family in FAMILIES.values():
    _config = getattr(modeling_gatepress, f"Gatepress{_family.class_prefix}Config")
    _model = getattr(modeling_gatepress, f"Gatepress{_family.class_prefix}ForSequenceClassification")
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModelForSequenceClassification.register(_config, _model, exist_ok=True)
    # save_pretrained of a loaded model then ships the code again, so that a copy reloads as well.
    _config.register_for_auto_class()
    _model.register_for_auto_class("AutoModelForSequenceClassification")
