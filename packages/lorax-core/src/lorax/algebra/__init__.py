"""Arithmetic on finished adapters: combine, resize, convert, and extract from a fine-tune."""

from ._combine import combine_adapters as combine_adapters
from ._extract import Extraction as Extraction, extract_lora as extract_lora
from ._matrices import Approximation as Approximation
from ._resize import as_lora as as_lora, resize_adapter as resize_adapter
