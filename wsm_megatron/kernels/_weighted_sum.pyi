def run(
    numel: int,
    sources: tuple[int, ...],
    source_types: bytes,
    coefficients: tuple[float, ...],
    outputs: tuple[int, ...],
    output_types: bytes,
) -> bool: ...
