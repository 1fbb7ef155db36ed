// node agents.mjs BASE_URL SCRIPT_FILE: tool round trips with Vercel's AI SDK and the official SDKs; one line of JSON for each.
import fs from 'node:fs'

import Anthropic from '@anthropic-ai/sdk'
import { createAnthropic } from '@ai-sdk/anthropic'
import { createOpenResponses } from '@ai-sdk/open-responses'
import { createOpenAI } from '@ai-sdk/openai'
import { generateText, jsonSchema, stepCountIs, streamText, tool } from 'ai'
import OpenAI from 'openai'

const [base, file] = process.argv.slice(2)
const call = '<think>\nHm.\n</think>\n\n<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
const script = (...says) => {
  fs.writeFileSync(file, JSON.stringify({ says, special: [], size: 3 }))
  fs.rmSync(file.replace('script.json', 'log'), { force: true })
}
const say = (...line) => console.log(JSON.stringify(line))
globalThis.AI_SDK_LOG_WARNINGS = false

const schema = { type: 'object', properties: { a: { type: 'integer' } }, required: ['a'], additionalProperties: false }
const tools = { f: tool({ description: 'd', inputSchema: jsonSchema(schema), execute: async ({ a }) => `${a + 6}` }) }
const models = {
  openai: createOpenAI({ baseURL: base, apiKey: 'any' }).responses('m'),
  'open-responses': createOpenResponses({ name: 'here', url: `${base}/responses`, apiKey: 'any' })('m'),
  anthropic: createAnthropic({ baseURL: base, apiKey: 'any' })('m'),
}
for (const [name, model] of Object.entries(models)) {
  const asked = { model, prompt: 'Hi', tools, stopWhen: stepCountIs(3), maxRetries: 0 }
  script(call, 'It is 7.')
  const done = await generateText(asked)
  say(name, 'plain', done.text, done.steps.length, done.steps[0].toolResults[0].output)
  script(call, 'It is 7.')
  const stream = streamText(asked)
  say(name, 'streamed', await stream.text, (await stream.steps).length)
}

script(call)
const response = await new OpenAI({ baseURL: base, apiKey: 'any' }).responses
  .stream({ model: 'm', input: 'Hi', tools: [{ type: 'function', name: 'f', parameters: schema, strict: true }] })
  .finalResponse()
say('openai', response.output.map((item) => item.type), response.output.at(-1).arguments)
script(call, 'It is 7.')
const runner = new OpenAI({ baseURL: base, apiKey: 'any' }).chat.completions.runTools({
  model: 'm', messages: [{ role: 'user', content: 'Hi' }], stream: true,
  tools: [{ type: 'function', function: { name: 'f', description: 'd', parameters: schema, parse: JSON.parse, function: ({ a }) => `${a + 6}` } }],
})
say('openai', 'runTools', await runner.finalContent(), runner.messages.map((one) => one.role))
script(call)
const message = await new Anthropic({ baseURL: base.replace('/v1', ''), apiKey: 'any' }).messages
  .stream({ model: 'm', max_tokens: 200, messages: [{ role: 'user', content: 'Hi' }], tools: [{ name: 'f', input_schema: schema }] })
  .finalMessage()
say('anthropic', message.content.map((block) => block.type), message.content.at(-1).input)
