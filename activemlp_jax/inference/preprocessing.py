"""Find the preprocessing of a model's images, with or without a model card."""

from activemlp_jax.data.preprocessing import Preprocessing, ScenePreprocessing
from activemlp_jax.models.segmentor import ActiveSegmentor, Model
from activemlp_jax.weights.model_card import ModelCard, check_card


def preprocessing_for(model: Model, card: ModelCard | None) -> Preprocessing | ScenePreprocessing:
    """Return the card's preprocessing; without a card, that of the published models.

    Args:
      model: a classifier or a segmentation model.
      card: result of `read_card`, or None.

    Raises:
      ValueError: if the card belongs to another model; or if there is no card, and the model does
        not have as many classes as the published ones, so that its preprocessing is unknown.
    """
    if card is not None:
        check_card(card, model)
        return card.preprocessing
    is_segmentor = isinstance(model, ActiveSegmentor)
    classes, data = (150, "ADE20K") if is_segmentor else (1000, "ImageNet")
    if model.num_classes != classes:
        raise ValueError(
            f"the model has {model.num_classes} classes, not {data}'s {classes}, so how to prepare "
            "its images has to be said: pass card=am.read_card(MODEL_DIR)"
        )
    return ScenePreprocessing() if is_segmentor else Preprocessing()
