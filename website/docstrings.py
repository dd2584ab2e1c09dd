"""A griffe extension: reads the sources of this repository as Python reads them."""

import re
from typing import Any

import griffe

EXAMPLE = re.compile(r"^Example:$", re.MULTILINE)

# Decorators that make a frozen dataclass, among other things.
DATACLASSES = {"defkind", "defformat"}


class Docstrings(griffe.Extension):
    """Examples are code, and classes of our own decorators have the signature of a dataclass."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Turns `Example:` into a section of examples instead of a note."""
        if obj.docstring:
            obj.docstring.value = EXAMPLE.sub("Examples:", obj.docstring.value)

    def on_class_instance(self, *, cls: griffe.Class, **kwargs: Any) -> None:
        """Adds `@dataclasses.dataclass` where one of our decorators applies it."""
        if any(str(decorator.value) in DATACLASSES for decorator in cls.decorators):
            module = griffe.ExprName("dataclasses", parent=cls.parent)
            made = griffe.ExprAttribute([module, griffe.ExprName("dataclass", parent=module)])
            cls.decorators.append(griffe.Decorator(made, lineno=None, endlineno=None))

    def on_attribute_instance(self, *, attr: griffe.Attribute, **kwargs: Any) -> None:
        """Shows the default of a field that is `static(default)`."""
        value = attr.value
        if isinstance(value, griffe.ExprCall) and str(value.function) == "static":
            attr.value = value.arguments[0] if value.arguments else None
