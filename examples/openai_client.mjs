// The official JavaScript SDK:  npm install openai@7.55.0 && node examples/openai_client.mjs [http://localhost:8000]
import OpenAI from 'openai';

const url = process.argv[2] ?? 'http://localhost:8000';
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: 'any' });
const model = (await client.models.list()).data[0].id;

const reply = await client.chat.completions.create({
  model, messages: [{ role: 'user', content: 'What is the capital of France?' }], temperature: 0, max_tokens: 32,
});
console.log(`${model} says: ${reply.choices[0].message.content}`);

const stream = await client.chat.completions.create({
  model, messages: [{ role: 'user', content: 'Write a haiku about coding.' }], max_tokens: 48, seed: 1, stream: true,
});
for await (const chunk of stream) process.stdout.write(chunk.choices[0]?.delta?.content ?? '');
console.log();

try {
  await client.chat.completions.create({ model, messages: [{ role: 'user', content: 'Hi' }], top_p: 7 });
} catch (error) {
  if (!(error instanceof OpenAI.BadRequestError)) throw error;
  console.log(`refused: ${error.param} - ${error.error.message}`);
}
