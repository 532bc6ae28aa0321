"""How the images of a model are prepared, with a card and without."""

from activemlp_jax.data.preprocessing import Preprocessing, ScenePreprocessing
from activemlp_jax.models.segmentor import ActiveSegmentor
from activemlp_jax.weights.architecture import Model
from activemlp_jax.weights.model_directory import ModelCard, check_card


def preprocessing_for(model: Model, card: ModelCard | None) -> Preprocessing | ScenePreprocessing:
    """As the card says; without one, as the published models have it.

    Args:
      model: to be shown images.
      card: what `read_card` gives.

    Raises:
      ValueError: the card is of another model, or there is none and the model has not the classes
        of a published one, so that nobody knows how its images are to be prepared.
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
