"""The sizes of the papers' models and the figures printed for them."""

# Name: hidden_dim, num_layers, num_heads, mlp_dim, patch size; millions of
# parameters of the dense model, with 32 experts in `last_<n>` and in `every_2`.
V_MOE_SIZES = {
    "vmoe_s32": (512, 8, 8, 2048, 32, "36.5", ("last_2", "166.7"), "296.9"),
    "vmoe_b32": (768, 12, 12, 3072, 32, "102.1", ("last_2", "395.0"), "980.6"),
    "vmoe_b16": (768, 12, 12, 3072, 16, "100.5", ("last_2", "393.3"), "979.0"),
    "vmoe_l32": (
        1024, 24, 16, 4096, 32, "325.3", ("last_2", "845.8"), "3448.2",
    ),
    "vmoe_l16": (
        1024, 24, 16, 4096, 16, "323.1", ("last_2", "843.6"), "3446.0",
    ),
    "vmoe_h14": (
        1280, 32, 16, 5120, 14, "655.8", ("last_5", "2688.6"), "7160.8",
    ),
}  # fmt: skip
# The same sizes, and experts; millions of parameters.
SOFT_MOE_SIZES = {
    "soft_moe_s16": (384, 12, 6, 1536, 16, 128, "933.7"),
    "soft_moe_s14": (384, 12, 6, 1536, 14, 256, "1841"),
    "soft_moe_b16": (768, 12, 12, 3072, 16, 128, "3708"),
    "soft_moe_l16": (1024, 24, 16, 4096, 16, 128, "13127"),
    "soft_moe_h14": (1280, 32, 16, 5120, 14, 256, "54177"),
}
# The same sizes; millions of parameters, giga multiply-adds, images per second
# and accuracy of the Sweet Spot paper.
VIT_SIZES = {
    "vit_s16": (384, 12, 6, 1536, 16, "22", "4.6", "1083", "79.8"),
    "vit_b16": (768, 12, 12, 3072, 16, "86.6", "17.5", "329", "82.8"),
}
# Name: depths, dims, isotropic; figures as above.
DEPTHS, LARGER_DEPTHS = (3, 3, 9, 3), (3, 3, 27, 3)
DIMS, LARGER_DIMS = (96, 192, 384, 768), (128, 256, 512, 1024)
CONVNEXT_SIZES = {
    "convnext_t": (DEPTHS, DIMS, False, "28.6", "4.5", "814", "82.1"),
    "convnext_s": (LARGER_DEPTHS, DIMS, False, "50", "8.7", "466", "83.1"),
    "convnext_b": (
        LARGER_DEPTHS, LARGER_DIMS, False, "88.6", "15.4", "299", "83.8",
    ),
    "convnext_iso_s": (18, 384, True, "22.3", "4.3", "1100", "79.7"),
    "convnext_iso_b": (
        18, 768, True, "82.4", "16.9", "336", "82.0",
        "the sizes give 87.1; 82.4 is the active count of its MoE",
    ),
}  # fmt: skip
# Name: features and heads of the first stage; experts, millions of parameters
# and accuracy of table 14 of the Sweet Spot paper, after ImageNet-21k at 192
# pixels; a note.
SWIN_SIZES = {
    "swin_s": (
        96, 3, (None, "65.8", "83.5*"), (8, "173.3", "84.5*"),
        (16, "296.1", "84.9*"),
        (32, "296.1", "84.7*", "the sizes give 541.8; table 14 repeats a row"),
    ),
    "swin_b": (
        128, 4, (None, "109.3", "85.1*"), (8, "300.3", "85.3*"),
        (16, "518.7", "85.5*"), (32, "955.3", "85.5*"),
    ),
}  # fmt: skip
# Image size: side of the windows, and by stage that of the pretraining.
SWIN_WINDOWS = {192: (12, None), 224: (14, (12, 12, 12, 6))}
SWIN_EXPERTS = {
    # Every second block of the third stage, and the last of the fourth.
    "layers": [*range(5, 22, 2), 23],
    "num_selected_experts": 1,
    "capacity_factor": 1.25,
    "batch_priority": True,
    "dropout": 0.1,
}
# Dense model, experts, placement, mlp_ratio of the experts (None: the dense
# MLP's); if printed: millions of parameters and of active ones, giga
# multiply-adds, images per second, accuracy; a note. (The totals leave out the
# gates.)
_ACTIVE = "the printed active count and GFLOPs of a ViT follow from no K"
SWEET_SPOT_MODELS = (
    ("vit_s16", 4, "last_2", None, "29.1", "25.0", None, None, "79.8", _ACTIVE),
    (
        "vit_s16", 8, "last_2", None, "38.6", "25.0", "5.3", "892", "80.5",
        f"{_ACTIVE}; table 3 swaps the GFLOPs with every_2",
    ),
    (
        "vit_s16", 8, "every_2", None, "71.7", "33.1", "6.9", "724", "80.7",
        f"{_ACTIVE}; table 3 swaps the GFLOPs with last_2",
    ),
    (
        "vit_s16", 16, "last_2", None, "57.5", "25.0", None, None, "80.2",
        _ACTIVE,
    ),
    ("vit_b16", 8, "last_2"),
    (
        "vit_b16", 8, "every_2", None, "284.9", "129.9", "26.3", "227", "82.5",
        _ACTIVE,
    ),
    ("convnext_t", 4, "last_2", 2, "34.5", "25.6", "4.2", "768", "82.1"),
    ("convnext_t", 4, "last_2"),
    (
        "convnext_t", 8, "last_2", None, "70.0", "28.7", "4.5", None, "83.5*",
        "the sizes give 69.93 and 28.60; not explained",
    ),
    ("convnext_t", 8, "last_2", 2, "46.3", "25.6", "4.2", None, "82.1"),
    (
        "convnext_t", 8, "last_3", None, "70.0", "28.6", "4.5", None, "83.5*",
        "the sizes give 78.2, which table 7 prints for stage",
    ),
    ("convnext_t", 8, "last_3", 2, "49.9", "25.0", "4.1", None, "82.1"),
    (
        "convnext_t", 8, "stage", None, "78.2", "28.6", "4.5", None, "83.5*",
        "the sizes give 72.5, those of last_3 78.2",
    ),
    ("convnext_t", 8, "stage", 2, "47.4", "25.5", "4.0", None, "82.1"),
    (
        "convnext_t", 8, "every_2", None, "97.5", "28.6", "4.5", None, "82.9*",
        "the sizes give 132.4",
    ),
    (
        "convnext_t", 8, "every_2", 2, "54.3", "17.0", "3.8", None, "81.8",
        "the sizes give 73.1 and 21.2; no placement gives the printed ones",
    ),
    ("convnext_t", 16, "last_2", None, "117.1", "28.6", "4.5", None, "83.6*"),
    (
        "convnext_t", 16, "last_2", 2, "46.3", "25.5", None, None, "81.7",
        "table 4 repeats the parameters of table 3",
    ),
    ("convnext_t", 32, "last_2", None, "211.6", "28.6", "4.5", None, "83.4*"),
    ("convnext_s", 4, "last_2", 2, "56.1", "47.3", "8.5", "442", "83.1"),
    ("convnext_s", 4, "last_2"),
    (
        "convnext_s", 8, "last_2", None, "91.6", "50.3", "8.7", None, "84.9*",
        "the sizes give 50.2 active",
    ),
    ("convnext_s", 16, "last_2"),
    ("convnext_b", 4, "last_2", 2, "99.1", "83.4", "15.0", "289", "83.5"),
    ("convnext_b", 4, "last_2"),
    ("convnext_b", 8, "last_2", None, "162.0", "88.6", "15.4", None, "85.7*"),
    ("convnext_b", 16, "last_2"),
    (
        "convnext_iso_s", 8, "last_2", None, "38.9", "22.3", "4.3", "1031",
        "80.3",
    ),
    (
        "convnext_iso_s", 8, "every_2", None, "96.7", "22.3", "8.7", None,
        "79.6", "the GFLOPs of table 3 are another model's",
    ),
    (
        "convnext_iso_b", 8, "last_2", 2, "115.4", "82.4", "16.9", "303",
        "81.6", "the GFLOPs are the dense model's; the sizes give 16.0",
    ),
    ("convnext_iso_b", 8, "last_2"),
    ("convnext_iso_b", 8, "every_2"),
)  # fmt: skip
