"""Operators: names that xFormers has for kernels. Which kernel runs is Headway's to choose."""

from __future__ import annotations

from typing import Any, ClassVar, TypeVar

Operator = TypeVar("Operator", bound="type[BaseOperator]")


class BaseOperator:
    OPERATOR: ClassVar[Any] = None
    NAME: ClassVar[str]
    OPERATOR_CATEGORY: ClassVar[str]

    @classmethod
    def is_available(cls) -> bool:
        return True


OPERATORS_REGISTRY: list[type[BaseOperator]] = []


def register_operator(cls: Operator) -> Operator:
    OPERATORS_REGISTRY.append(cls)
    return cls
