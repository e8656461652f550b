"""Types of modules for type checking, more precise than those of PyTorch and timm; at run time PyTorch's classes."""

from typing import TYPE_CHECKING, Any, Callable, Dict, Generic, Iterator, List, Sequence, Set, TypeVar, Union, overload

import torch
import torch.nn as nn

__all__ = ['ModuleListOf', 'TimmModel']

if TYPE_CHECKING:
    ModuleT = TypeVar('ModuleT', bound=nn.Module)

    class TimmModel(nn.Module):
        """What is used of timm's models; not every model has the methods from `no_weight_decay` on."""

        default_cfg: Dict[str, Any]
        feature_info: Sequence[Dict[str, Any]]
        num_classes: int
        _traits: Dict[str, Any]

        forward_features: Callable[[torch.Tensor], torch.Tensor]
        forward_head: Callable[..., torch.Tensor]
        forward_intermediates: Callable[..., Any]
        get_classifier: Callable[[], nn.Module]
        reset_classifier: Callable[..., None]
        set_grad_checkpointing: Callable[[bool], None]
        no_weight_decay: Callable[[], Set[str]]
        group_matcher: Callable[..., Dict[str, Any]]
        set_input_size: Callable[..., None]
        prune_intermediate_layers: Callable[..., List[int]]

    class ModuleListOf(nn.ModuleList, Generic[ModuleT]):
        """``nn.ModuleList`` of modules of one class."""

        def __iter__(self) -> Iterator[ModuleT]: ...

        @overload
        def __getitem__(self, idx: slice) -> 'ModuleListOf[ModuleT]': ...

        @overload
        def __getitem__(self, idx: int) -> ModuleT: ...

        def __getitem__(self, idx: Union[int, slice]) -> Union[ModuleT, 'ModuleListOf[ModuleT]']: ...

else:
    TimmModel = nn.Module

    class ModuleListOf:
        """Makes a plain ``nn.ModuleList``."""

        def __new__(cls, modules: Any = None) -> nn.ModuleList:
            """Make the list."""
            return nn.ModuleList(modules)

        def __class_getitem__(cls, item: Any) -> type:
            """Return the class of the list, for annotations."""
            return nn.ModuleList
