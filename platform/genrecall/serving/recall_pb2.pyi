from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Shopper(_message.Message):
    __slots__ = ("gender", "age_band")
    GENDER_FIELD_NUMBER: _ClassVar[int]
    AGE_BAND_FIELD_NUMBER: _ClassVar[int]
    gender: str
    age_band: str
    def __init__(self, gender: _Optional[str] = ..., age_band: _Optional[str] = ...) -> None: ...

class CategoryPath(_message.Message):
    __slots__ = ("names",)
    NAMES_FIELD_NUMBER: _ClassVar[int]
    names: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, names: _Optional[_Iterable[str]] = ...) -> None: ...

class Filters(_message.Message):
    __slots__ = ("categories", "brands", "in_stock", "excluded")
    CATEGORIES_FIELD_NUMBER: _ClassVar[int]
    BRANDS_FIELD_NUMBER: _ClassVar[int]
    IN_STOCK_FIELD_NUMBER: _ClassVar[int]
    EXCLUDED_FIELD_NUMBER: _ClassVar[int]
    categories: _containers.RepeatedCompositeFieldContainer[CategoryPath]
    brands: _containers.RepeatedScalarFieldContainer[str]
    in_stock: bool
    excluded: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, categories: _Optional[_Iterable[_Union[CategoryPath, _Mapping]]] = ..., brands: _Optional[_Iterable[str]] = ..., in_stock: _Optional[bool] = ..., excluded: _Optional[_Iterable[str]] = ...) -> None: ...

class RecallRequest(_message.Message):
    __slots__ = ("query", "shopper", "history", "beam_size", "filters", "limit", "explain", "deadline_ms", "version")
    QUERY_FIELD_NUMBER: _ClassVar[int]
    SHOPPER_FIELD_NUMBER: _ClassVar[int]
    HISTORY_FIELD_NUMBER: _ClassVar[int]
    BEAM_SIZE_FIELD_NUMBER: _ClassVar[int]
    FILTERS_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    EXPLAIN_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_MS_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    query: str
    shopper: Shopper
    history: _containers.RepeatedScalarFieldContainer[str]
    beam_size: int
    filters: Filters
    limit: int
    explain: bool
    deadline_ms: int
    version: str
    def __init__(self, query: _Optional[str] = ..., shopper: _Optional[_Union[Shopper, _Mapping]] = ..., history: _Optional[_Iterable[str]] = ..., beam_size: _Optional[int] = ..., filters: _Optional[_Union[Filters, _Mapping]] = ..., limit: _Optional[int] = ..., explain: _Optional[bool] = ..., deadline_ms: _Optional[int] = ..., version: _Optional[str] = ...) -> None: ...

class RecallBatchRequest(_message.Message):
    __slots__ = ("requests",)
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    requests: _containers.RepeatedCompositeFieldContainer[RecallRequest]
    def __init__(self, requests: _Optional[_Iterable[_Union[RecallRequest, _Mapping]]] = ...) -> None: ...

class ItemExplanation(_message.Message):
    __slots__ = ("sid_score", "share", "path")
    SID_SCORE_FIELD_NUMBER: _ClassVar[int]
    SHARE_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    sid_score: float
    share: float
    path: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, sid_score: _Optional[float] = ..., share: _Optional[float] = ..., path: _Optional[_Iterable[str]] = ...) -> None: ...

class Prefix(_message.Message):
    __slots__ = ("prefix", "label", "size")
    PREFIX_FIELD_NUMBER: _ClassVar[int]
    LABEL_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    prefix: str
    label: str
    size: int
    def __init__(self, prefix: _Optional[str] = ..., label: _Optional[str] = ..., size: _Optional[int] = ...) -> None: ...

class RecalledItem(_message.Message):
    __slots__ = ("item_id", "title", "brand", "category_path", "rank", "sid", "score", "explanation")
    ITEM_ID_FIELD_NUMBER: _ClassVar[int]
    TITLE_FIELD_NUMBER: _ClassVar[int]
    BRAND_FIELD_NUMBER: _ClassVar[int]
    CATEGORY_PATH_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    SID_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    EXPLANATION_FIELD_NUMBER: _ClassVar[int]
    item_id: str
    title: str
    brand: str
    category_path: _containers.RepeatedScalarFieldContainer[str]
    rank: int
    sid: str
    score: float
    explanation: ItemExplanation
    def __init__(self, item_id: _Optional[str] = ..., title: _Optional[str] = ..., brand: _Optional[str] = ..., category_path: _Optional[_Iterable[str]] = ..., rank: _Optional[int] = ..., sid: _Optional[str] = ..., score: _Optional[float] = ..., explanation: _Optional[_Union[ItemExplanation, _Mapping]] = ...) -> None: ...

class RecalledSid(_message.Message):
    __slots__ = ("sid", "score", "size", "label", "path")
    SID_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    LABEL_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    sid: str
    score: float
    size: int
    label: str
    path: _containers.RepeatedCompositeFieldContainer[Prefix]
    def __init__(self, sid: _Optional[str] = ..., score: _Optional[float] = ..., size: _Optional[int] = ..., label: _Optional[str] = ..., path: _Optional[_Iterable[_Union[Prefix, _Mapping]]] = ...) -> None: ...

class Versions(_message.Message):
    __slots__ = ("model", "bundle", "catalog_seq", "role")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    BUNDLE_FIELD_NUMBER: _ClassVar[int]
    CATALOG_SEQ_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    model: str
    bundle: str
    catalog_seq: int
    role: str
    def __init__(self, model: _Optional[str] = ..., bundle: _Optional[str] = ..., catalog_seq: _Optional[int] = ..., role: _Optional[str] = ...) -> None: ...

class Timings(_message.Message):
    __slots__ = ("generate_ms", "expand_ms", "batch_size", "cached")
    GENERATE_MS_FIELD_NUMBER: _ClassVar[int]
    EXPAND_MS_FIELD_NUMBER: _ClassVar[int]
    BATCH_SIZE_FIELD_NUMBER: _ClassVar[int]
    CACHED_FIELD_NUMBER: _ClassVar[int]
    generate_ms: float
    expand_ms: float
    batch_size: int
    cached: bool
    def __init__(self, generate_ms: _Optional[float] = ..., expand_ms: _Optional[float] = ..., batch_size: _Optional[int] = ..., cached: _Optional[bool] = ...) -> None: ...

class RecallResponse(_message.Message):
    __slots__ = ("items", "sids", "beam_size", "versions", "timings", "degraded", "degraded_by", "read_as")
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    SIDS_FIELD_NUMBER: _ClassVar[int]
    BEAM_SIZE_FIELD_NUMBER: _ClassVar[int]
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    DEGRADED_FIELD_NUMBER: _ClassVar[int]
    DEGRADED_BY_FIELD_NUMBER: _ClassVar[int]
    READ_AS_FIELD_NUMBER: _ClassVar[int]
    items: _containers.RepeatedCompositeFieldContainer[RecalledItem]
    sids: _containers.RepeatedCompositeFieldContainer[RecalledSid]
    beam_size: int
    versions: Versions
    timings: Timings
    degraded: bool
    degraded_by: _containers.RepeatedScalarFieldContainer[str]
    read_as: str
    def __init__(self, items: _Optional[_Iterable[_Union[RecalledItem, _Mapping]]] = ..., sids: _Optional[_Iterable[_Union[RecalledSid, _Mapping]]] = ..., beam_size: _Optional[int] = ..., versions: _Optional[_Union[Versions, _Mapping]] = ..., timings: _Optional[_Union[Timings, _Mapping]] = ..., degraded: _Optional[bool] = ..., degraded_by: _Optional[_Iterable[str]] = ..., read_as: _Optional[str] = ...) -> None: ...

class RecallBatchResponse(_message.Message):
    __slots__ = ("answers",)
    ANSWERS_FIELD_NUMBER: _ClassVar[int]
    answers: _containers.RepeatedCompositeFieldContainer[RecallResponse]
    def __init__(self, answers: _Optional[_Iterable[_Union[RecallResponse, _Mapping]]] = ...) -> None: ...

class ModelRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class CatalogueInfo(_message.Message):
    __slots__ = ("later_items", "changed_items", "delisted_items", "out_of_stock_items", "error_ratio", "oversize_sids", "unknown_categories", "alarms", "problem")
    LATER_ITEMS_FIELD_NUMBER: _ClassVar[int]
    CHANGED_ITEMS_FIELD_NUMBER: _ClassVar[int]
    DELISTED_ITEMS_FIELD_NUMBER: _ClassVar[int]
    OUT_OF_STOCK_ITEMS_FIELD_NUMBER: _ClassVar[int]
    ERROR_RATIO_FIELD_NUMBER: _ClassVar[int]
    OVERSIZE_SIDS_FIELD_NUMBER: _ClassVar[int]
    UNKNOWN_CATEGORIES_FIELD_NUMBER: _ClassVar[int]
    ALARMS_FIELD_NUMBER: _ClassVar[int]
    PROBLEM_FIELD_NUMBER: _ClassVar[int]
    later_items: int
    changed_items: int
    delisted_items: int
    out_of_stock_items: int
    error_ratio: float
    oversize_sids: int
    unknown_categories: float
    alarms: _containers.RepeatedScalarFieldContainer[str]
    problem: str
    def __init__(self, later_items: _Optional[int] = ..., changed_items: _Optional[int] = ..., delisted_items: _Optional[int] = ..., out_of_stock_items: _Optional[int] = ..., error_ratio: _Optional[float] = ..., oversize_sids: _Optional[int] = ..., unknown_categories: _Optional[float] = ..., alarms: _Optional[_Iterable[str]] = ..., problem: _Optional[str] = ...) -> None: ...

class ChallengerInfo(_message.Message):
    __slots__ = ("versions", "canary_share", "shadow_share", "refused")
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    CANARY_SHARE_FIELD_NUMBER: _ClassVar[int]
    SHADOW_SHARE_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    versions: Versions
    canary_share: float
    shadow_share: float
    refused: str
    def __init__(self, versions: _Optional[_Union[Versions, _Mapping]] = ..., canary_share: _Optional[float] = ..., shadow_share: _Optional[float] = ..., refused: _Optional[str] = ...) -> None: ...

class ModelInfo(_message.Message):
    __slots__ = ("versions", "address", "items", "sids", "levels", "stage", "refused", "genders", "age_bands", "catalogue", "challenger")
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    SIDS_FIELD_NUMBER: _ClassVar[int]
    LEVELS_FIELD_NUMBER: _ClassVar[int]
    STAGE_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    GENDERS_FIELD_NUMBER: _ClassVar[int]
    AGE_BANDS_FIELD_NUMBER: _ClassVar[int]
    CATALOGUE_FIELD_NUMBER: _ClassVar[int]
    CHALLENGER_FIELD_NUMBER: _ClassVar[int]
    versions: Versions
    address: str
    items: int
    sids: int
    levels: _containers.RepeatedScalarFieldContainer[int]
    stage: str
    refused: str
    genders: _containers.RepeatedScalarFieldContainer[str]
    age_bands: _containers.RepeatedScalarFieldContainer[str]
    catalogue: CatalogueInfo
    challenger: ChallengerInfo
    def __init__(self, versions: _Optional[_Union[Versions, _Mapping]] = ..., address: _Optional[str] = ..., items: _Optional[int] = ..., sids: _Optional[int] = ..., levels: _Optional[_Iterable[int]] = ..., stage: _Optional[str] = ..., refused: _Optional[str] = ..., genders: _Optional[_Iterable[str]] = ..., age_bands: _Optional[_Iterable[str]] = ..., catalogue: _Optional[_Union[CatalogueInfo, _Mapping]] = ..., challenger: _Optional[_Union[ChallengerInfo, _Mapping]] = ...) -> None: ...

class ItemUpsert(_message.Message):
    __slots__ = ("item_id", "title", "category_path", "brand", "text", "price", "prior_score")
    ITEM_ID_FIELD_NUMBER: _ClassVar[int]
    TITLE_FIELD_NUMBER: _ClassVar[int]
    CATEGORY_PATH_FIELD_NUMBER: _ClassVar[int]
    BRAND_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    PRICE_FIELD_NUMBER: _ClassVar[int]
    PRIOR_SCORE_FIELD_NUMBER: _ClassVar[int]
    item_id: str
    title: str
    category_path: _containers.RepeatedScalarFieldContainer[str]
    brand: str
    text: str
    price: float
    prior_score: float
    def __init__(self, item_id: _Optional[str] = ..., title: _Optional[str] = ..., category_path: _Optional[_Iterable[str]] = ..., brand: _Optional[str] = ..., text: _Optional[str] = ..., price: _Optional[float] = ..., prior_score: _Optional[float] = ...) -> None: ...

class ItemsRequest(_message.Message):
    __slots__ = ("upsert", "delist", "out_of_stock", "in_stock")
    UPSERT_FIELD_NUMBER: _ClassVar[int]
    DELIST_FIELD_NUMBER: _ClassVar[int]
    OUT_OF_STOCK_FIELD_NUMBER: _ClassVar[int]
    IN_STOCK_FIELD_NUMBER: _ClassVar[int]
    upsert: _containers.RepeatedCompositeFieldContainer[ItemUpsert]
    delist: _containers.RepeatedScalarFieldContainer[str]
    out_of_stock: _containers.RepeatedScalarFieldContainer[str]
    in_stock: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, upsert: _Optional[_Iterable[_Union[ItemUpsert, _Mapping]]] = ..., delist: _Optional[_Iterable[str]] = ..., out_of_stock: _Optional[_Iterable[str]] = ..., in_stock: _Optional[_Iterable[str]] = ...) -> None: ...

class ItemsAccepted(_message.Message):
    __slots__ = ("catalog_seq", "upserted", "delisted", "stock_flags")
    CATALOG_SEQ_FIELD_NUMBER: _ClassVar[int]
    UPSERTED_FIELD_NUMBER: _ClassVar[int]
    DELISTED_FIELD_NUMBER: _ClassVar[int]
    STOCK_FLAGS_FIELD_NUMBER: _ClassVar[int]
    catalog_seq: int
    upserted: int
    delisted: int
    stock_flags: int
    def __init__(self, catalog_seq: _Optional[int] = ..., upserted: _Optional[int] = ..., delisted: _Optional[int] = ..., stock_flags: _Optional[int] = ...) -> None: ...

class Problem(_message.Message):
    __slots__ = ("field", "message")
    FIELD_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    field: str
    message: str
    def __init__(self, field: _Optional[str] = ..., message: _Optional[str] = ...) -> None: ...

class ErrorResponse(_message.Message):
    __slots__ = ("error", "problems")
    ERROR_FIELD_NUMBER: _ClassVar[int]
    PROBLEMS_FIELD_NUMBER: _ClassVar[int]
    error: str
    problems: _containers.RepeatedCompositeFieldContainer[Problem]
    def __init__(self, error: _Optional[str] = ..., problems: _Optional[_Iterable[_Union[Problem, _Mapping]]] = ...) -> None: ...
