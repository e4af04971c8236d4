"""The functions of an MLC library that compute shapes, brought into one order.

TVM's ``VMShapeLower`` gathers the lengths that a Relax function has to compute in sets ordered by addresses
in memory: a function's stores come in another order each time, and so does the choice of functions that are
the same. Without this pass the same model would be compiled to other bytes in every run.
"""

import tvm
import tvm_ffi
from tvm import relax, tirx


@tvm.transform.module_pass(opt_level=0, name="shapes_in_order")
def shapes_in_order(module: tvm.IRModule, _: tvm.transform.PassContext) -> tvm.IRModule:
    """Sorts the stores of each function ``shape_func*`` by where they store, keeps one of those that are the
    same then, and numbers the rest anew. To be run after TVM's last passes on Relax.

    Where a store reads what another one of its function writes, the order is left as it is.
    """
    functions = dict(module.functions_items())
    names = [name for name in functions if name.name_hint.startswith("shape_func")]
    names.sort(key=lambda name: (len(name.name_hint), name.name_hint))
    kept: dict[tvm_ffi.StructuralKey, tvm.ir.GlobalVar] = {}
    calls = _Calls()
    for name in names:
        function = _sorted(functions.pop(name)).without_attr("global_symbol")
        key = tvm_ffi.StructuralKey(function)  # type: ignore[call-arg]
        if key not in kept:
            kept[key] = names[len(kept)]
            functions[kept[key]] = function.with_attr("global_symbol", kept[key].name_hint)
        calls.instead[name.name_hint] = kept[key]
    for name, function in functions.items():
        if isinstance(function, relax.Function):
            functions[name] = calls.visit_expr(function)
    return tvm.IRModule(functions, attrs=module.attrs, global_infos=module.global_infos)


@relax.expr_functor.mutator
class _Calls(relax.PyExprMutator):  # type: ignore[misc]
    """Calls one function instead of another."""

    def __init__(self) -> None:
        super().__init__()
        self.instead: dict[str, tvm.ir.GlobalVar] = {}

    def visit_global_var_(self, name: tvm.ir.GlobalVar) -> tvm.ir.GlobalVar:
        return self.instead.get(name.name_hint, name)


def _sorted(function: tirx.PrimFunc) -> tirx.PrimFunc:
    if not isinstance(function.body, tirx.SeqStmt):
        return function
    stores = list(function.body.seq)
    if not all(isinstance(store, tirx.BufferStore) for store in stores):
        return function
    written = {int(store.indices[0]) for store in stores}
    read: set[int] = set()
    for store in stores:
        tvm_ffi.structural_walk(store.value, (tvm.ir.TensorLoad, lambda load: read.add(int(load.indices[0]))))
    if len(written) < len(stores) or read & written:
        return function
    stores.sort(key=lambda store: int(store.indices[0]))
    return function.with_body(tirx.SeqStmt(stores))
