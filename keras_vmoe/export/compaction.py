"""A graph that does the same in a fraction of the bytes.

TensorFlow writes what Keras traced as it was traced: sizes and constants over
and over, every operation under the path of its layer, which each reader
repeats, and every layer anew for every position of the routing dial. That can
be more than the weights.
"""

import collections
import graphlib
import itertools

# Shapes are inferred when a graph is loaded; nothing served has gradients.
UNUSED = ("_output_shapes", "_gradient_op_type")


def compact_version(folder):
    """Makes the graph of a SavedModel smaller, and its fingerprint anew.

    Args:
        folder: `pathlib.Path` of the SavedModel.
    """
    from tensorflow.core.protobuf import saved_model_pb2
    from tensorflow.python.saved_model import fingerprinting_utils

    path = folder / "saved_model.pb"
    proto = saved_model_pb2.SavedModel.FromString(path.read_bytes())
    for graph in proto.meta_graphs:
        operations = graph.meta_info_def.stripped_op_list.op
        stateful = {op.name for op in operations if op.is_stateful}
        called = set(graph.object_graph_def.concrete_functions)
        called.update(*map(_functions_of, graph.graph_def.node))
        library = graph.graph_def.library
        for function in library.function:
            compact_function(function, stateful)
            if function.signature.name not in called:
                rename_arguments(function)
        merge_functions(library, called)
    path.write_bytes(proto.SerializeToString(deterministic=True))
    fingerprinting_utils.write_fingerprint(str(folder))


def compact_function(function, stateful):
    """Makes a function smaller, in place.

    Operations without a reader go, equal ones become one, and all get short
    names. Those with a state stay.

    Args:
        function: A `FunctionDef`.
        stateful: Names of the operations with a state.
    """
    nodes = {node.name: node for node in function.node_def}
    names, found, counts = {}, {}, collections.Counter()
    for node in [nodes[name] for name in _live(function, nodes, stateful)]:
        old, node.name = node.name, ""
        for attribute in UNUSED:
            node.attr.pop(attribute, None)
        node.ClearField("experimental_debug_info")
        node.input[:] = [_renamed(x, names) for x in node.input]
        key = node.SerializeToString(deterministic=True)
        if node.op in stateful or key not in found:
            node.name = f"{node.op}_{counts[node.op]}"
            counts[node.op] += 1
            found[key] = node
        names[old] = found[key].name
    kept = [nodes[old] for old in names if nodes[old].name]
    function.ClearField("node_def")
    function.node_def.extend(kept)
    for name, value in list(function.ret.items()):
        function.ret[name] = _renamed(value, names)
    controls = sorted({names[x] for x in function.control_ret.values()})
    function.control_ret.clear()
    function.control_ret.update({name: name for name in controls})
    function.signature.control_output[:] = controls


def rename_arguments(function):
    """Gives the arguments of a function names that tell nothing, in place.

    Args:
        function: A `FunctionDef`, which is called by others alone, after
            `compact_function`: its nodes have other names than these.
    """
    names = {}
    for i, argument in enumerate(function.signature.input_arg):
        names[argument.name] = argument.name = f"argument_{i}"
        if i in function.arg_attr:
            function.arg_attr[i].attr.pop("_user_specified_name", None)
    for node in function.node_def:
        node.input[:] = [_renamed(x, names) for x in node.input]
    for name, value in list(function.ret.items()):
        function.ret[name] = _renamed(value, names)


def merge_functions(library, called):
    """Lets functions that do the same be one, in place.

    Args:
        library: A `FunctionDefLibrary`.
        called: Names of the functions that must stay.
    """
    functions = {x.signature.name: x for x in library.function}
    calls = {
        name: set().union(*map(_functions_of, x.node_def)) & set(functions)
        for name, x in functions.items()
    }
    names, found = {}, {}
    for name in graphlib.TopologicalSorter(calls).static_order():
        function = functions[name]
        for node in function.node_def:
            for other in itertools.chain(*map(_called, node.attr.values())):
                other.name = names.get(other.name, other.name)
        function.signature.name = ""
        key = function.SerializeToString(deterministic=True)
        function.signature.name = name
        first = found.setdefault(key, name)
        names[name] = name if name in called else first
    kept = [functions[x] for x in names if x == names[x]]
    library.ClearField("function")
    library.function.extend(kept)


def _functions_of(node):
    """Names of the functions that a node calls."""
    return {x.name for value in node.attr.values() for x in _called(value)}


def _called(value):
    """The functions that an attribute names."""
    if value.HasField("func"):
        return [value.func]
    return value.list.func


def _live(function, nodes, stateful):
    """Names of the nodes that do something, each after what it reads."""
    waiting = [_source(x) for x in function.ret.values()]
    waiting += function.control_ret.values()
    waiting += [name for name, x in nodes.items() if x.op in stateful]
    read = {}
    while waiting:
        name = waiting.pop()
        if name in nodes and name not in read:  # Else an argument.
            read[name] = [_source(x) for x in nodes[name].input]
            waiting += read[name]
    order = graphlib.TopologicalSorter(read).static_order()
    return [name for name in order if name in read]


def _source(value):
    """The node of what another one reads, such as `"^a"` or `"a:sum:0"`."""
    return value.removeprefix("^").partition(":")[0]


def _renamed(value, names):
    source = _source(value)
    return value.replace(source, names.get(source, source), 1)
