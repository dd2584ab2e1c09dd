"""A griffe extension for the docstrings and decorators of this repository."""

import re
from typing import Any

import griffe

EXAMPLE = re.compile(r"^Example:$", re.MULTILINE)

# Decorators that also make a class a frozen dataclass.
DATACLASSES = {"defkind", "defformat"}


class Docstrings(griffe.Extension):
    """Renders examples as code, and classes with our decorators as dataclasses."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Turns `Example:` into a section of examples instead of a note."""
        if obj.docstring:
            obj.docstring.value = EXAMPLE.sub("Examples:", obj.docstring.value)

    def on_class_instance(self, *, cls: griffe.Class, **kwargs: Any) -> None:
        """Adds `@dataclasses.dataclass` if one of our decorators applies it."""
        if any(str(decorator.value) in DATACLASSES for decorator in cls.decorators):
            module = griffe.ExprName("dataclasses", parent=cls.parent)
            dataclass = griffe.ExprAttribute([module, griffe.ExprName("dataclass", parent=module)])
            cls.decorators.append(griffe.Decorator(dataclass, lineno=None, endlineno=None))

    def on_attribute_instance(self, *, attr: griffe.Attribute, **kwargs: Any) -> None:
        """Shows the default of a field that is `static(default)`."""
        value = attr.value
        if isinstance(value, griffe.ExprCall) and str(value.function) == "static":
            attr.value = value.arguments[0] if value.arguments else None
