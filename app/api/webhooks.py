"""Webhooks: whom a tenant wants to be told of its runs, and what became of the messages."""

from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Depends, Path, Query, Response

from app.api.body import JsonBody
from app.api.deps import Admin, RunReader, Services, ServicesDep
from app.api.openapi import json_body, problems
from app.api.pagination import PageById, cut, id_cursor
from app.api.webhook_schemas import CreatedWebhook, CreateWebhook, Delivery, DeliveryList, Webhook, WebhookList
from app.db import deliveries, runs, webhooks
from app.db.engine import transactional
from app.domain import webhook as domain
from app.domain.egress import check, read_origins, read_url
from app.domain.errors import (
    EgressRefused,
    FieldError,
    InvalidRequest,
    NotFound,
    TooManyWebhooks,
    WebhookDisabled,
    WebhooksOff,
)
from app.webhook_signature import derive_secret, write_secret

router = APIRouter(tags=["webhooks"])

WebhookId = Annotated[UUID, Path(description="The webhook's id.")]
DeliveryId = Annotated[UUID, Path(description="The delivery's id.")]
RunId = Annotated[UUID, Path(description="The run's id.")]


@router.post(
    "/v1/webhooks",
    status_code=201,
    operation_id="createWebhook",
    summary="Create a webhook",
    response_description="Created, with its secret, which is shown this once.",
    responses={
        201: {"headers": {"Location": {"description": "Where the webhook is.", "schema": {"type": "string"}}}},
        **problems(409, 413, 415, 422),
    },
    openapi_extra=json_body(CreateWebhook),
)
async def create_webhook(
    response: Response,
    caller: Admin,
    services: ServicesDep,
    body: Annotated[CreateWebhook, Depends(JsonBody(CreateWebhook))],
) -> CreatedWebhook:
    key = services.settings.webhook_signing_key
    if key is None:
        raise WebhooksOff("this deployment has no key to sign messages with (WEBHOOK_SIGNING_KEY)")
    _check_url(services, body.url)
    events = [event for event in domain.WebhookEvent if event in body.events]
    async with transactional(services.engine).begin() as connection:
        webhook = await webhooks.create(
            connection, tenant=caller.tenant, url=body.url, events=events, created_by=caller.actor
        )
    if webhook is None:
        raise TooManyWebhooks(f"the tenant has {domain.MAX_WEBHOOKS} webhooks, and may have no more")
    response.headers["Location"] = f"/v1/webhooks/{webhook.id}"
    secret = write_secret(derive_secret(key.get_secret_value(), webhook.id))
    return CreatedWebhook(**Webhook.of(webhook).model_dump(), secret=secret)


@router.get("/v1/webhooks", operation_id="listWebhooks", summary="List webhooks, newest first", responses=problems(422))
async def list_webhooks(caller: Admin, services: ServicesDep, query: Annotated[PageById, Query()]) -> WebhookList:
    async with services.engine.connect() as connection:
        found = await webhooks.list_newest(connection, caller.tenant, before=query.cursor, limit=query.limit + 1)
    page, next_cursor = cut(found, query.limit, lambda webhook: id_cursor(webhook.id))
    return WebhookList(data=[Webhook.of(webhook) for webhook in page], next_cursor=next_cursor)


@router.get("/v1/webhooks/{webhook_id}", operation_id="getWebhook", summary="Read a webhook", responses=problems(404))
async def get_webhook(caller: Admin, services: ServicesDep, webhook_id: WebhookId) -> Webhook:
    return Webhook.of(await _find(services, webhook_id, caller.tenant))


@router.delete(
    "/v1/webhooks/{webhook_id}",
    status_code=204,
    operation_id="deleteWebhook",
    summary="Delete a webhook",
    response_description="Deleted: what is pending is not sent any more.",
    responses=problems(404),
)
async def delete_webhook(caller: Admin, services: ServicesDep, webhook_id: WebhookId) -> None:
    async with services.engine.connect() as connection:
        if not await webhooks.delete(connection, webhook_id, caller.tenant):
            raise NotFound("no such webhook")


@router.get(
    "/v1/webhooks/{webhook_id}/deliveries",
    operation_id="listDeliveries",
    summary="List what was sent to a webhook, newest first",
    responses=problems(404, 422),
)
async def list_deliveries(
    caller: Admin, services: ServicesDep, webhook_id: WebhookId, query: Annotated[PageById, Query()]
) -> DeliveryList:
    await _find(services, webhook_id, caller.tenant)
    async with services.engine.connect() as connection:
        found = await deliveries.of_webhook(
            connection, webhook_id, caller.tenant, before=query.cursor, limit=query.limit + 1
        )
    return DeliveryList.of(*cut(found, query.limit, lambda delivery: id_cursor(delivery.id)))


@router.get(
    "/v1/runs/{run_id}/deliveries",
    operation_id="listRunDeliveries",
    summary="List what webhooks were told of a run, newest first",
    responses=problems(404, 422),
)
async def list_run_deliveries(
    caller: RunReader, services: ServicesDep, run_id: RunId, query: Annotated[PageById, Query()]
) -> DeliveryList:
    async with services.engine.connect() as connection:
        if await runs.get(connection, run_id, caller.tenant) is None:
            raise NotFound("no such run")
        found = await deliveries.of_run(connection, run_id, caller.tenant, before=query.cursor, limit=query.limit + 1)
    return DeliveryList.of(*cut(found, query.limit, lambda delivery: id_cursor(delivery.id)))


@router.post(
    "/v1/webhooks/{webhook_id}/deliveries/{delivery_id}/redeliver",
    status_code=202,
    operation_id="redeliver",
    summary="Send a message once more",
    response_description="It is sent right away, with the same `webhook-id`, as if it had just happened.",
    responses=problems(404, 409),
)
async def redeliver(caller: Admin, services: ServicesDep, webhook_id: WebhookId, delivery_id: DeliveryId) -> Delivery:
    webhook = await _find(services, webhook_id, caller.tenant)
    if webhook.disabled_at is not None:
        raise WebhookDisabled(f"the webhook is disabled: {webhook.disabled_why}")
    async with services.engine.connect() as connection:
        delivery = await deliveries.redeliver(connection, delivery_id, webhook_id, caller.tenant)
    if delivery is None:
        raise NotFound("no such delivery")
    return Delivery.of(delivery)


async def _find(services: Services, webhook_id: UUID, tenant: str) -> domain.Webhook:
    async with services.engine.connect() as connection:
        webhook = await webhooks.get(connection, webhook_id, tenant)
    if webhook is None:
        raise NotFound("no such webhook")
    return webhook


def _check_url(services: Services, url: str) -> None:
    """What its name stands for is looked at whenever something is sent there."""
    try:
        check(read_url(url), read_origins(services.settings.egress_trusted_origins))
    except EgressRefused as error:
        raise InvalidRequest(
            "messages cannot be sent to this address", errors=(FieldError("#/url", str(error)),)
        ) from None
