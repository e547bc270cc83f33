"""Values that a config.json may hold, for fields that may be anything."""

from hypothesis import strategies as st

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.integers()
    | st.sampled_from([10**9, 2**31, 2**63, 10**400, -(10**400), 48, 96, 1e300, 1e-300, 5e-324])
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from(["", "yarn", "dynamic", "llama3", "default", "sliding_attention", "gelu"])
    | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)
ROPE = [
    "rope_type",
    "type",
    "rope_theta",
    "factor",
    "partial_rotary_factor",
    "original_max_position_embeddings",
    "low_freq_factor",
    "high_freq_factor",
    "beta_fast",
    "beta_slow",
    "attention_factor",
    "mscale",
    "mscale_all_dim",
    "truncate",
]
