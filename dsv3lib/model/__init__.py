"""The whole model: ``DeepSeekV3``, its stages, its loss, what it takes in and gives out, what it costs."""

from .deepseek_v3 import DeepSeekV3
from .loss import next_token_loss
from .outputs import ModelOutput

__all__ = ["DeepSeekV3", "ModelOutput", "next_token_loss"]
