"""Import this module to make the Auto classes know pruned models: `import gatepress.auto`.

This registration is the only side effect that importing a gatepress module has.
"""

from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

from gatepress.families import FAMILIES
from gatepress.resolve import known, model_class

for _family in filter(known, FAMILIES.values()):
    _config = model_class(_family).config_class
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    _config.register_for_auto_class()
    for _auto, _head in ((AutoModelForSequenceClassification, True), (AutoModel, False)):
        _model = model_class(_family, head=_head)
        _auto.register(_config, _model, exist_ok=True)
        # save_pretrained of a loaded model then ships the code again, so that a copy reloads as well.
        _model.register_for_auto_class(_auto.__name__)
